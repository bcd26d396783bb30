from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    def __init__(self, report: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("beat_s",)
    BEAT_S_FIELD_NUMBER: _ClassVar[int]
    beat_s: float
    def __init__(self, beat_s: _Optional[float] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("id", "load")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    id: str
    load: bytes
    def __init__(self, id: _Optional[str] = ..., load: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("beat_s",)
    BEAT_S_FIELD_NUMBER: _ClassVar[int]
    beat_s: float
    def __init__(self, beat_s: _Optional[float] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("roles", "loads")
    ROLES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    roles: _containers.RepeatedScalarFieldContainer[str]
    loads: bool
    def __init__(self, roles: _Optional[_Iterable[str]] = ..., loads: _Optional[bool] = ...) -> None: ...

class MemberChanges(_message.Message):
    __slots__ = ("put", "left", "expired", "whole", "settle_s")
    PUT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    SETTLE_S_FIELD_NUMBER: _ClassVar[int]
    put: _containers.RepeatedScalarFieldContainer[bytes]
    left: _containers.RepeatedScalarFieldContainer[str]
    expired: _containers.RepeatedScalarFieldContainer[str]
    whole: bool
    settle_s: float
    def __init__(self, put: _Optional[_Iterable[bytes]] = ..., left: _Optional[_Iterable[str]] = ..., expired: _Optional[_Iterable[str]] = ..., whole: _Optional[bool] = ..., settle_s: _Optional[float] = ...) -> None: ...
