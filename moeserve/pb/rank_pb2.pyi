from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToRank(_message.Message):
    __slots__ = ("submit", "end")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    submit: _containers.RepeatedCompositeFieldContainer[Submission]
    end: _containers.RepeatedCompositeFieldContainer[Ending]
    def __init__(self, submit: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ..., end: _Optional[_Iterable[_Union[Ending, _Mapping]]] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("id", "prompt", "outputs", "sampling", "salt", "domain", "adapter", "timeout_s", "moved", "reached", "sources", "trace", "priority", "tenant")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    salt: str
    domain: str
    adapter: str
    timeout_s: float
    moved: bool
    reached: int
    sources: _containers.RepeatedCompositeFieldContainer[KvSource]
    trace: str
    priority: int
    tenant: str
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., salt: _Optional[str] = ..., domain: _Optional[str] = ..., adapter: _Optional[str] = ..., timeout_s: _Optional[float] = ..., moved: _Optional[bool] = ..., reached: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[KvSource, _Mapping]]] = ..., trace: _Optional[str] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("address", "server_name", "running")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    address: str
    server_name: str
    running: str
    def __init__(self, address: _Optional[str] = ..., server_name: _Optional[str] = ..., running: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias_ids", "biases", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "allowed_token_ids", "bad_token_ids", "grammar")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_token_ids: _containers.RepeatedCompositeFieldContainer[BadTokens]
    grammar: Grammar
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_token_ids: _Optional[_Iterable[_Union[BadTokens, _Mapping]]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class BadTokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text", "whitespace")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WHITESPACE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    whitespace: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ..., whitespace: _Optional[str] = ...) -> None: ...

class Ending(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class FromRank(_message.Message):
    __slots__ = ("news", "taken", "round", "returned", "uses")
    NEWS_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    news: _containers.RepeatedCompositeFieldContainer[News]
    taken: _containers.RepeatedScalarFieldContainer[str]
    round: int
    returned: _containers.RepeatedCompositeFieldContainer[Returned]
    uses: _containers.RepeatedCompositeFieldContainer[Use]
    def __init__(self, news: _Optional[_Iterable[_Union[News, _Mapping]]] = ..., taken: _Optional[_Iterable[str]] = ..., round: _Optional[int] = ..., returned: _Optional[_Iterable[_Union[Returned, _Mapping]]] = ..., uses: _Optional[_Iterable[_Union[Use, _Mapping]]] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("id", "reached")
    ID_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    id: str
    reached: int
    def __init__(self, id: _Optional[str] = ..., reached: _Optional[int] = ...) -> None: ...

class News(_message.Message):
    __slots__ = ("id", "tokens", "scores", "finish", "error", "cached_tokens", "prompt_scores")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedCompositeFieldContainer[Scores]
    finish: str
    error: str
    cached_tokens: int
    prompt_scores: _containers.RepeatedCompositeFieldContainer[Scores]
    def __init__(self, id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[_Union[Scores, _Mapping]]] = ..., finish: _Optional[str] = ..., error: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., prompt_scores: _Optional[_Iterable[_Union[Scores, _Mapping]]] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("chosen", "top_ids", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top: _Optional[_Iterable[float]] = ...) -> None: ...

class Use(_message.Message):
    __slots__ = ("kind", "tokens", "ranks")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    tokens: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[str] = ..., tokens: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class CountedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CountedReply(_message.Message):
    __slots__ = ("work", "counters", "finished", "microbatches", "load", "expert_choices", "moe_layers", "received")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class FinishedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MicrobatchesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    WORK_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CHOICES_FIELD_NUMBER: _ClassVar[int]
    MOE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    work: Work
    counters: _containers.ScalarMap[str, float]
    finished: _containers.ScalarMap[str, int]
    microbatches: _containers.ScalarMap[int, int]
    load: Load
    expert_choices: _containers.RepeatedScalarFieldContainer[int]
    moe_layers: _containers.RepeatedScalarFieldContainer[int]
    received: _containers.RepeatedCompositeFieldContainer[ReceivedKv]
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., counters: _Optional[_Mapping[str, float]] = ..., finished: _Optional[_Mapping[str, int]] = ..., microbatches: _Optional[_Mapping[int, int]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., expert_choices: _Optional[_Iterable[int]] = ..., moe_layers: _Optional[_Iterable[int]] = ..., received: _Optional[_Iterable[_Union[ReceivedKv, _Mapping]]] = ...) -> None: ...

class ReceivedKv(_message.Message):
    __slots__ = ("source", "bytes", "runs")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    source: str
    bytes: int
    runs: int
    def __init__(self, source: _Optional[str] = ..., bytes: _Optional[int] = ..., runs: _Optional[int] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("rounds", "tokens", "copies", "inter_node", "came", "dispatch_bytes", "combine_bytes", "waited_s")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    INTER_NODE_FIELD_NUMBER: _ClassVar[int]
    CAME_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMBINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    tokens: int
    copies: int
    inter_node: int
    came: int
    dispatch_bytes: int
    combine_bytes: int
    waited_s: float
    def __init__(self, rounds: _Optional[int] = ..., tokens: _Optional[int] = ..., copies: _Optional[int] = ..., inter_node: _Optional[int] = ..., came: _Optional[int] = ..., dispatch_bytes: _Optional[int] = ..., combine_bytes: _Optional[int] = ..., waited_s: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "total_blocks", "free_blocks", "cached_blocks", "block_size")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_size: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., block_size: _Optional[int] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...
