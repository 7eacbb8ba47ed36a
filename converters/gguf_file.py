"""Reads the metadata and the tensors of a GGUF file, or of all parts of a split one. Tensors stay memory-mapped.

    metadata, tensors = read_gguf(Path("model-00001-of-00003.gguf"))

The gguf package's reader takes seconds for a vocabulary, and trusts the counts in a broken header.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from utils.errors import UsageError

SCALARS = {  # type -> letter in a format of the module struct
    GGUFValueType.UINT8: "B", GGUFValueType.UINT16: "H", GGUFValueType.UINT32: "I", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT8: "b", GGUFValueType.INT16: "h", GGUFValueType.INT32: "i", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}
KNOWN_TYPES = {ggml_type.value for ggml_type in GGMLQuantizationType}
MAX_TYPE = 256  # more types than there will ever be; a larger number means that the file is broken
MAX_COUNT = 2**24  # of tensors, fields, elements or characters; a larger number means that the header is broken


@dataclass
class GGUFTensor:
    """A tensor as it is stored, perhaps quantized."""

    ggml_type: GGMLQuantizationType
    data: np.ndarray  # uint8 [..., bytes of a row]

    def shape(self) -> tuple[int, ...]:
        return gguf.quant_shape_from_byte_shape(self.data.shape, self.ggml_type)


def read_gguf(file: Path) -> tuple[dict, dict[str, GGUFTensor]]:
    """Returns the metadata and the tensors. If file is a part of a split GGUF, these are the tensors of all parts."""
    metadata, tensors = read_part(file)
    n_parts = metadata.get("split.count", 1)
    if type(n_parts) is not int or n_parts <= 1:
        return metadata, tensors
    parts = part_names(file, n_parts)
    for part in parts:
        if not part.is_file():
            raise UsageError(f"{part} does not exist; {file} needs all {n_parts} parts")
    contents = [read_part(part) for part in parts]
    for i, (part_metadata, _) in enumerate(contents):
        if (part_metadata.get("split.no"), part_metadata.get("split.count")) != (i, n_parts):
            raise UsageError(f"{parts[i]} is not part {i + 1} of {n_parts}")
    tensors = {name: tensor for _, part_tensors in contents for name, tensor in part_tensors.items()}
    metadata, _ = contents[0]  # only the first part has the model's metadata
    n_tensors = metadata.get("split.tensors.count", len(tensors))
    if n_tensors != len(tensors):
        raise UsageError(f"the {n_parts} parts of {file} hold {len(tensors)} tensors, not {n_tensors}")
    return metadata, tensors


def part_names(file: Path, n_parts: int) -> list[Path]:
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file.name)
    if match is None or int(match[2]) != n_parts:
        raise UsageError(f"{file} is one of {n_parts} parts, but not named like x-00001-of-{n_parts:05}.gguf")
    return [file.with_name(f"{match[1]}-{i + 1:05}-of-{match[2]}.gguf") for i in range(n_parts)]


def read_part(file: Path) -> tuple[dict, dict[str, GGUFTensor]]:
    try:
        return parse(np.memmap(file, mode="r"))
    except (MemoryError, OSError, UsageError):
        raise
    except Exception as e:  # struct, numpy and gguf raise many types on broken input
        raise UsageError(f"{file} is truncated or not GGUF ({type(e).__name__})") from None


def parse(data: np.ndarray) -> tuple[dict, dict[str, GGUFTensor]]:
    header = Header(data)
    if header.scalar("4s") != b"GGUF" or header.scalar("I") not in (2, 3):
        raise ValueError("not GGUF")
    n_tensors, n_fields = header.count(), header.count()
    metadata = {}
    for _ in range(n_fields):
        name = header.string()
        metadata[name] = header.value(type_id=header.scalar("I"))
    infos = []
    for _ in range(n_tensors):
        name = header.string()
        shape = [header.scalar("Q") for _ in range(header.count("I"))]
        infos.append((name, shape[::-1], header.scalar("I"), header.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(header.offset / alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in infos:
        if type_id not in KNOWN_TYPES and type_id < MAX_TYPE:
            raise UsageError(f"{name} has type {type_id}, which the gguf package does not know")
        ggml_type = GGMLQuantizationType(type_id)
        byte_shape = gguf.quant_shape_to_byte_shape(shape, ggml_type)
        tensor = data[start + offset :][: math.prod(byte_shape)]
        tensors[name] = GGUFTensor(ggml_type, tensor.reshape(byte_shape))
    return metadata, tensors


class Header:
    """Reads the header of a GGUF file value by value: metadata, and the name, shape and offset of each tensor."""

    def __init__(self, data: np.ndarray):
        self.data, self.offset = data, 0

    def scalar(self, form: str):
        """form: the format of the value, for the module struct"""
        (value,) = struct.unpack_from("<" + form, self.data, self.offset)
        self.offset += struct.calcsize("<" + form)
        return value

    def count(self, form: str = "Q") -> int:
        n = self.scalar(form)
        if n > MAX_COUNT:
            raise ValueError("no file has so many")
        return n

    def string(self) -> str:
        return self.scalar(f"{self.count()}s").decode()

    def value(self, type_id: int):
        if type_id == GGUFValueType.ARRAY:
            element_type = self.scalar("I")
            return [self.value(element_type) for _ in range(self.count())]
        if type_id == GGUFValueType.STRING:
            return self.string()
        return self.scalar(SCALARS[type_id])
