from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PageKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class HaveReply(_message.Message):
    __slots__ = ("held", "nbytes")
    HELD_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    held: bytes
    nbytes: int
    def __init__(self, held: _Optional[bytes] = ..., nbytes: _Optional[int] = ...) -> None: ...

class PageHead(_message.Message):
    __slots__ = ("key", "namespace", "nbytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    namespace: bytes
    nbytes: int
    def __init__(self, key: _Optional[bytes] = ..., namespace: _Optional[bytes] = ..., nbytes: _Optional[int] = ...) -> None: ...

class PagePart(_message.Message):
    __slots__ = ("head", "digest")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    head: PageHead
    digest: bytes
    def __init__(self, head: _Optional[_Union[PageHead, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PutPart(_message.Message):
    __slots__ = ("offer", "digest")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    offer: _containers.RepeatedCompositeFieldContainer[PageHead]
    digest: bytes
    def __init__(self, offer: _Optional[_Iterable[_Union[PageHead, _Mapping]]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, outcomes: _Optional[_Iterable[str]] = ...) -> None: ...

class DoubtRequest(_message.Message):
    __slots__ = ("keys", "drop")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    drop: bool
    def __init__(self, keys: _Optional[bytes] = ..., drop: _Optional[bool] = ...) -> None: ...

class DoubtReply(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: int
    def __init__(self, dropped: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("stored_bytes", "capacity_bytes", "counts")
    class CountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    stored_bytes: int
    capacity_bytes: int
    counts: _containers.ScalarMap[str, int]
    def __init__(self, stored_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., counts: _Optional[_Mapping[str, int]] = ...) -> None: ...
