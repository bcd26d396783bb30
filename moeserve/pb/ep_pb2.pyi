from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

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
