"""Rewrite a GGUF file with Q4_1 matrices and a Q8_0 vocabulary, which every peer reads.

    python benchmarks/requantize_gguf.py qwen2.5-coder-0.5b-q4_k_m.gguf qwen-q4_1.gguf

OpenVINO refuses files that mix in Q5_0, as those of models whose sizes K-quants do not divide.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

VOCABULARY = ("token_embd.weight", "output.weight")
OWN_FIELDS = ("general.architecture", "general.file_type")  # that the writer or we set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    reader = GGUFReader(args.source)
    writer = GGUFWriter(args.output, reader.fields["general.architecture"].contents())
    copy_fields(reader, writer)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        kind = GGMLQuantizationType.Q8_0 if tensor.name in VOCABULARY else GGMLQuantizationType.Q4_1
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in OWN_FIELDS:
            continue
        kind, *element = field.types
        value = field.contents()
        if kind == GGUFValueType.ARRAY:
            writer.add_key_value(field.name, value, kind, sub_type=element[-1])
        else:
            writer.add_key_value(field.name, value, kind)


if __name__ == "__main__":
    main()
