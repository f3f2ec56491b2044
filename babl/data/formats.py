"""Data files of every shape that is about, as one record a question: JSON, JSON lines, CSV and Parquet, packed or not.

Whatever holds the questions (SQuAD's articles and paragraphs, MRQA's contexts, an array, a line, a row of a table), a
record comes out flat, with the title and context of what it stood in. What its fields hold is not looked at here.
"""

import ast
import csv
import glob
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babl.errors import UserError, not_installed
from babl.files import joint_hash

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of a folder's data files, or these and .gz
CONTAINERS = ("data", "paragraphs", "qas")  # what a list of questions, or of what holds them, is called
COLUMNS = (
    "id", "qid", "title", "context", "question", "answers", "answer", "answer_start", "is_impossible", "grade",
)  # fmt: skip


@dataclass
class Records:
    """What was read.

    Attributes:
        rows: Where each question stands, in words, and its fields.
        version: As the file calls it; empty where it does not say; of several files, 2.0 where one of them is.
        faults: A line for each place that cannot be read.
    """

    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    version: str = ""
    faults: list[str] = field(default_factory=list)

    def add(self, where: str, node: Any, inherited: dict[str, Any]) -> None:
        """The questions of a parsed value are among the rows, in its order.

        Args:
            where: The value stands, for errors; empty at the top.
            node: A question, something that holds questions, or a list of either.
            inherited: Title and context of what the value stands in.
        """
        if isinstance(node, list):
            for i, child in enumerate(node):
                self.add(f"{where}[{i}]" if where else f"row {i + 1}", child, inherited)
            return
        if not isinstance(node, dict):
            self.faults.append(f"{where or 'top level'}: expected an object, found {type(node).__name__}")
            return
        inner = next((name for name in CONTAINERS if name in node), None)
        if inner is None:
            if node.keys() & {"question", "answers", "answer"}:
                self.rows.append((where or "row 1", inherited | node))
            elif "header" not in node:  # MRQA's first line
                keys = ", ".join(map(str, list(node)[:5])) or "none"
                self.faults.append(f"{where or 'top level'}: neither a question nor a list of them (keys: {keys})")
            return
        if not isinstance(node[inner], list):
            found = type(node[inner]).__name__
            self.faults.append(f"{where}.{inner}: expected a list, found {found}".removeprefix("."))
            return
        inherited = inherited | {key: node[key] for key in ("title", "context") if key in node}
        if inner == "paragraphs" and not inherited.get("title"):
            inherited["title"] = nameless(str(_first_context(node[inner])))
        self.add(f"{where}.{inner}".removeprefix("."), node[inner], inherited)


def nameless(text: str) -> str:
    """Returns a title for an article that has none, by its first context."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def _first_context(paragraphs: Sequence[Any]) -> Any:
    return next((p["context"] for p in paragraphs if isinstance(p, dict) and p.get("context")), "")


def data_files(path: str | Path) -> list[Path]:
    """Returns the file at a path, a folder's data files, or the files that a pattern with * names, in name order.

    Raises:
        UserError: There are none.
    """
    if Path(path).is_dir():
        files = [p for p in sorted(Path(path).iterdir()) if p.is_file() and _suffix(p) in SUFFIXES]
        if not files:
            raise UserError(f"{path}: the folder has no data file ({', '.join(SUFFIXES)}, or one of them and .gz)")
        return files
    files = [] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    return files or [Path(path)]


def data_hash(path: str | Path) -> str:
    """Returns the sha256, in hex, of the data files at a path."""
    return joint_hash(data_files(path))


def read_records(path: str | Path) -> Records:
    """Returns the questions of a file, of a folder's files, or of the files that a pattern names.

    Raises:
        UserError: A file is missing, or is not what its name or beginning says as a whole.
    """
    files, found = data_files(path), Records()
    for file in files:
        _read(file, f"{file.name} " if len(files) > 1 else "", found)
    return found


def _read(file: Path, prefix: str, found: Records) -> None:
    """The records have the file's, each place named after the prefix."""
    try:
        data = file.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if data.startswith(b"PAR1"):
            return _table(file, prefix, found, *_parquet(file, data))
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no {error.encoding} text at byte {error.start}; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    if _suffix(file) in (".csv", ".tsv"):
        return _table(file, prefix, found, *_csv(file, text))
    if _suffix(file) in (".jsonl", ".ndjson") or _is_lines(text):
        return _lines(text, prefix, found)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: malformed JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: malformed JSON ({error})") from None
    if isinstance(tree, dict) and "2.0" not in found.version:
        found.version = str(tree.get("version", "")) or found.version
    found.add(prefix.strip(), tree, {})


def _suffix(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix.lower()


def _is_lines(text: str) -> bool:
    """Whether the first line is a value of its own, and not the only one."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str, prefix: str, found: Records) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was put after another
        if not line.strip():
            continue
        try:
            found.add(f"{prefix}line {number}", json.loads(line), {})
        except json.JSONDecodeError as error:
            found.faults.append(f"{prefix}malformed JSON at line {number} column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            found.faults.append(f"{prefix}malformed JSON at line {number} ({error})")


def _table(file: Path, prefix: str, found: Records, columns: Sequence[str], rows: Iterable[dict[Any, Any]]) -> None:
    if not {"answers", "answer"} & set(columns):
        shown = ", ".join(map(repr, columns[:8]))
        raise UserError(f"{file}: its columns are {shown}, expected id, title, context, question and answers")
    for name in COLUMNS:
        if columns.count(name) > 1:
            raise UserError(f"{file}: has {columns.count(name)} columns called {name}; keep the one that is meant")
    for number, row in enumerate(rows, start=1):
        if None in row:
            cells = len(row) - 1 + len(row[None])
            found.faults.append(
                f"{prefix}row {number} has {cells} cells for {len(columns)} columns: text with commas stands in quotes"
            )
            continue
        found.add(f"{prefix}row {number}", row, {})


def _parquet(file: Path, data: bytes) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Returns the names of all columns and the rows, of the columns that are looked at."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: Parquet is read by pyarrow, and {not_installed('pyarrow')}") from None
    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        names = table.schema_arrow.names
        batches = list(table.iter_batches(columns=[name for name in names if name in COLUMNS]))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    return names, (row for batch in batches for row in batch.to_pylist())


def _csv(file: Path, text: str) -> tuple[list[str], Iterator[dict[Any, Any]]]:
    """Returns the names of the columns and the rows, cells beyond the columns under None."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if _suffix(file) == ".tsv" else ",")
    try:
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise UserError(f"{file}: cannot be read as CSV, line {reader.line_num}: {error}") from None
    return columns, (
        {
            key: _literal(row[key]) if key in ("answers", "answer_start") else row[key]
            for key in (*COLUMNS, None)
            if row.get(key) is not None
        }
        for row in rows
    )


def _literal(text: str) -> Any:
    """Returns the value of JSON, or of Python as pandas writes it, in which lists may be calls of `array`.

    None where there is no text; what cannot be read stays text.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = _Arrays().visit(ast.parse(text.strip(), mode="eval"))
        return ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text


class _Arrays(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Returns the list in `array([...], dtype=...)`."""
        named = isinstance(node.func, ast.Name) and node.func.id == "array" and len(node.args) == 1
        return self.visit(node.args[0]) if named else node
