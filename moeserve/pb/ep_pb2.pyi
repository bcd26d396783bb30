from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Channel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANNEL_UNSPECIFIED: _ClassVar[Channel]
    CHANNEL_STEPS: _ClassVar[Channel]
    CHANNEL_HEARTBEAT: _ClassVar[Channel]
CHANNEL_UNSPECIFIED: Channel
CHANNEL_STEPS: Channel
CHANNEL_HEARTBEAT: Channel

class Arrival(_message.Message):
    __slots__ = ("version", "protocol", "world", "host", "cpus")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol: int
    world: int
    host: str
    cpus: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, version: _Optional[str] = ..., protocol: _Optional[int] = ..., world: _Optional[int] = ..., host: _Optional[str] = ..., cpus: _Optional[_Iterable[int]] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("checkpoint", "settings", "plan")
    class CheckpointEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _containers.ScalarMap[str, str]
    settings: _containers.ScalarMap[str, str]
    plan: str
    def __init__(self, checkpoint: _Optional[_Mapping[str, str]] = ..., settings: _Optional[_Mapping[str, str]] = ..., plan: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("rank", "channel", "nonce")
    RANK_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    channel: Channel
    nonce: bytes
    def __init__(self, rank: _Optional[int] = ..., channel: _Optional[_Union[Channel, str]] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce", "proof")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    proof: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("beat", "trouble", "end", "stop")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    beat: Beat
    trouble: Trouble
    end: End
    stop: Stop
    def __init__(self, beat: _Optional[_Union[Beat, _Mapping]] = ..., trouble: _Optional[_Union[Trouble, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("activity",)
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    activity: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, activity: _Optional[_Iterable[str]] = ...) -> None: ...

class Trouble(_message.Message):
    __slots__ = ("reason", "ranks")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reason: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
