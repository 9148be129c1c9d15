"""How much a compressed chunk may hold, told from its headers alone: a few bytes can stand for any number of zeros.

Source: RFC 8878, sections 3.1.1 (frames) and 3.1.1.2 (blocks).
"""

from .entries import DamagedFileError

_MAGIC, _BLOCK_BYTES = 0xFD2FB528, 2**17
_RAW, _REPEATED, _COMPRESSED = range(3)


def _header_bytes(descriptor: int) -> int:
    """Length of a frame's header after its descriptor: window, dictionary and content size."""
    is_single = descriptor >> 5 & 1
    content = (is_single, 2, 4, 8)[descriptor >> 6]
    return (1 - is_single) + (0, 1, 2, 4)[descriptor & 3] + content


def decoded_limit(data: bytes) -> int:
    """Most bytes that Zstandard frames can decode to.

    Raises:
      DamagedFileError: They are no such frames.
    """
    at = total = 0
    while at < len(data):
        if int.from_bytes(data[at : at + 4], "little") != _MAGIC or at + 5 > len(data):
            raise DamagedFileError("a chunk is not compressed as it was written")
        descriptor, is_last = data[at + 4], False
        at += 5 + _header_bytes(descriptor)
        while not is_last:
            header = data[at : at + 3]
            if len(header) < 3:
                raise DamagedFileError("a compressed chunk is cut short")
            bits = int.from_bytes(header, "little")
            is_last, kind, size = bool(bits & 1), bits >> 1 & 3, bits >> 3
            total += _BLOCK_BYTES if kind == _COMPRESSED else size
            at += 3 + (1 if kind == _REPEATED else size)
        at += 4 * (descriptor >> 2 & 1)
    return total
