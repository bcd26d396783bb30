from moeserve.pb import rank_pb2 as _rank_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToSource(_message.Message):
    __slots__ = ("wanted", "again", "stop", "freed", "done")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    wanted: Wanted
    again: Again
    stop: Stop
    freed: Freed
    done: Done
    def __init__(self, wanted: _Optional[_Union[Wanted, _Mapping]] = ..., again: _Optional[_Union[Again, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., freed: _Optional[_Union[Freed, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("compute_id", "geometry", "submission", "have", "running", "memory", "registered")
    COMPUTE_ID_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    compute_id: str
    geometry: bytes
    submission: _rank_pb2.Submission
    have: int
    running: str
    memory: Memory
    registered: Registered
    def __init__(self, compute_id: _Optional[str] = ..., geometry: _Optional[bytes] = ..., submission: _Optional[_Union[_rank_pb2.Submission, _Mapping]] = ..., have: _Optional[int] = ..., running: _Optional[str] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., registered: _Optional[_Union[Registered, _Mapping]] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("session", "address", "slots", "slot_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    address: int
    slots: int
    slot_bytes: int
    def __init__(self, session: _Optional[str] = ..., address: _Optional[int] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("pid", "fd", "cookie", "slots", "slot_bytes")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    cookie: bytes
    slots: int
    slot_bytes: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., cookie: _Optional[bytes] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class Again(_message.Message):
    __slots__ = ("layer", "start", "count")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    start: int
    count: int
    def __init__(self, layer: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Freed(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FromSource(_message.Message):
    __slots__ = ("begun", "spans", "news", "beat", "handed", "ended", "made", "flow")
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    HANDED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    FLOW_FIELD_NUMBER: _ClassVar[int]
    begun: Begun
    spans: Spans
    news: _rank_pb2.News
    beat: Beat
    handed: Handed
    ended: Ended
    made: Made
    flow: Flow
    def __init__(self, begun: _Optional[_Union[Begun, _Mapping]] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., news: _Optional[_Union[_rank_pb2.News, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., handed: _Optional[_Union[Handed, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., made: _Optional[_Union[Made, _Mapping]] = ..., flow: _Optional[_Union[Flow, _Mapping]] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("run_size", "memory", "registered")
    RUN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    run_size: int
    memory: bool
    registered: bool
    def __init__(self, run_size: _Optional[int] = ..., memory: _Optional[bool] = ..., registered: _Optional[bool] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("spans", "slot", "last")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    slot: int
    last: bool
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., slot: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class Flow(_message.Message):
    __slots__ = ("first", "frames", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    frames: _containers.RepeatedCompositeFieldContainer[Spans]
    last: bool
    def __init__(self, first: _Optional[int] = ..., frames: _Optional[_Iterable[_Union[Spans, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("layer", "start", "stop", "digests")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    start: int
    stop: int
    digests: bytes
    def __init__(self, layer: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., digests: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("waiting",)
    WAITING_FIELD_NUMBER: _ClassVar[int]
    waiting: bool
    def __init__(self, waiting: _Optional[bool] = ...) -> None: ...

class Handed(_message.Message):
    __slots__ = ("outputs", "computed", "spans")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    computed: int
    spans: Spans
    def __init__(self, outputs: _Optional[_Iterable[int]] = ..., computed: _Optional[int] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Made(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[_Iterable[int]] = ...) -> None: ...
