"""Small files of the formats that a corpus is read from."""

import json

import pyarrow as pa
import pyarrow.parquet as pq


def stream(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=250)
    return sink.getvalue().to_pybytes()


def arrow_file(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=250)
    return sink.getvalue().to_pybytes()


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=250, **options)
    return sink.getvalue().to_pybytes()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_saved(folder, tables, state=None, **files):
    """A folder as `datasets.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        (folder / name).write_bytes(stream(table))
    default = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(default if state is None else state))
    (folder / "dataset_info.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
