"""The column of a parquet shard that holds the documents."""

import pyarrow as pa


def holds_text(schema: pa.Schema) -> bool:
    """Check whether a file of this schema has a column `text` of strings, plain or by dictionary."""
    kind = schema.field("text").type if "text" in schema.names else pa.null()
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())
