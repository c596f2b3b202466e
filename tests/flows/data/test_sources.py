"""Every kind of source gives the same documents, in pieces too; what is wrong with one is said with where it is."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from checkpoint.store import open_store
from flows.data import documents, prepare
from flows.data.sources import open_source, tables
from flows.data.sources.base import Borne
from tests.flows.data.test_pieces import never
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

TEXTS = [f"{n} " + "the quick brown fox jumps over it " * (1 + n % 5) for n in range(30)]


def spec_of(source: str, **more: object) -> DataSpec:
    return DataSpec.model_validate({"source": source, "vocab_size": 300, "piece_mib": 1, **more})


def texts(source: str, **more: object) -> list[str]:
    return [doc.text for doc in documents(spec_of(source, **more))]


def lines(some: list[str], **more: object) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in some).encode()


# --- packed -------------------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("how", PACKED)
def test_packed_files_are_read_whatever_their_names(here: Path, how: str) -> None:
    pack = PACKED[how]
    data = lines(TEXTS)
    Path("c/a.jsonl").write_bytes(pack(data[:900]) + pack(data[900:]))
    Path("c/b.txt").write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo"))
    assert texts("jsonl:c/*.jsonl") == TEXTS
    assert [doc.whole() for doc in documents("text:c/b.txt")] == ["one\ntwo"]


def test_zstandard_that_begins_with_a_frame_to_skip(here: Path) -> None:
    """As pzstd and seekable files do."""
    skipped = b"\x5e\x2a\x4d\x18\4\0\0\0size"
    Path("c/a.jsonl").write_bytes(skipped + zstandard.compress(lines(TEXTS[:9])))
    Path("c/b.jsonl").write_bytes(zstandard.compress(lines(TEXTS[9:])) + skipped)
    assert texts("jsonl:c/*.jsonl") == TEXTS


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("damage", ["cut", "cut early", "cut between", "flipped", "more"])
def test_packed_files_that_are_damaged_are_named(here: Path, how: str, damage: str) -> None:
    dice = random.Random(2)
    data = PACKED[how](lines(["".join(dice.choices("abcdefgh ", k=900)) for _ in range(200)]))
    second = PACKED[how](lines(TEXTS))
    whole = {
        "cut": data[:-9],
        "cut early": data[:7],
        "cut between": data + second[:5],
        "flipped": data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) * 9 + data[len(data) // 2 + 9 :],
        "more": data + b"and some text",
    }[damage]
    Path("c/a.jsonl").write_bytes(whole)
    with pytest.raises(DatasetError, match=r"c/a.jsonl .*(cut short|do not unpack|no JSON object|no UTF-8)") as caught:
        texts("jsonl:c/*.jsonl")
    if damage.startswith("cut"):
        assert "it was cut short; fetch it anew" in str(caught.value)


def test_a_flood_is_no_flood_of_memory(here: Path) -> None:
    """Few bytes that unpack to many come in chunks."""
    from flows.data.sources.files import chunks_of, entry_of, opened_file

    for how, pack in PACKED.items():
        path = Path(f"c/{how}")
        path.write_bytes(pack(bytes([65]) * (80 << 20)))
        with opened_file(entry_of(str(path))) as file:
            sizes = [len(chunk) for chunk in chunks_of(file, how)]
        assert sum(sizes) == 80 << 20
        assert max(sizes) <= 34 << 20


def test_zstandard_with_a_window_beyond_reason(here: Path) -> None:
    made = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=False)
    ).compressobj()
    Path("c/a.jsonl").write_bytes(made.compress(lines(TEXTS)) + made.flush())
    with pytest.raises(DatasetError, match="window above 128 MiB"):
        texts("jsonl:c/*.jsonl")


def test_a_library_that_is_missing_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, source in (("zstandard", "jsonl:c/a.zst"), ("pyarrow.parquet", "parquet:c/a"), ("datasets", "hf:x/y")):
        Path("c/a.zst").write_bytes(zstandard.compress(lines(TEXTS)))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(SpecError, match=r"needs .*: pip install 'hotstage\[data\]'"):
                texts(source)


# --- tables -------------------------------------------------------------------------------------------------


def table(path: str, group: int = 7, **columns: Any) -> None:
    rows = len(next(iter(columns.values())))
    made = {"id": pyarrow.array(range(rows)), **{n: pyarrow.array(c) for n, c in columns.items()}}
    pyarrow.parquet.write_table(pyarrow.table(made), path, row_group_size=group)


def test_parquet_gives_its_texts_in_any_pieces(here: Path, small: Callable[[int], None]) -> None:
    table("c/a.parquet", content=TEXTS)
    table("c/b.parquet", content=pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode())
    assert texts("parquet:c/*.parquet", field="content") == TEXTS * 2
    (row, *_) = documents(spec_of("parquet:c/a.parquet", field="content", filter={"predicate": "os.path:exists"}))
    assert (row.name, row.fields) == ("c/a.parquet, row 1", {"id": 0})
    spec = spec_of("parquet:c/*.parquet", field="content")
    Path("c/a.jsonl").write_bytes(lines(TEXTS * 2))
    want = prepare(spec_of("jsonl:c/a.jsonl"), open_store("memory:"))
    for size in (1 << 20, 2000, 100):
        small(size)
        assert prepare(spec, open_store("memory:"), clock=never) == want
    source = open_source(spec)
    entry = source.look()[0]
    each = [list(source.read(entry, at, at + 50, Borne())) for at in range(0, entry.size, 50)]
    assert [doc.text for part in each for doc in part] == TEXTS
    assert max(map(len, each)) == 7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: table("c/a", content=TEXTS),
            r"has no column 'text'; its columns are 'id', 'content': name .*content",
        ),
        (lambda: table("c/a", text=list(range(30))), r"column 'text' is of type int64, not of text"),
        (lambda: table("c/a", text=[None] * 30), r"of type null, not of text; all of it is null: leave c/a out"),
        (
            lambda: table("c/a", messages=[[{"role": "user"}]] * 30),
            r"'messages' is a conversation: name it in data.mess",
        ),
        (
            lambda: table("c/a", text=[[{"role": "user"}]] * 30),
            r"not of text: it is a conversation, name it in data.mess",
        ),
        (lambda: table("c/a", text=[b"x"] * 30), r"is of type binary, not of text; write it as one: .*cast"),
        (
            lambda: table("c/a", text=[{"a": "x"}] * 30),
            r"is of type struct<a: string>, not of text; write its texts as",
        ),
        (lambda: table("c/a", text=[*TEXTS[:20], None, *TEXTS[21:]]), r"c/a, row 21 has no text: its text is null"),
        (lambda: Path("c/a").write_bytes(b"PAR1" + bytes(90)), r"c/a is a Parquet file that was cut short"),
        (lambda: Path("c/a").write_bytes(b"PAR1" + bytes(90) + b"PAR1"), r"c/a does not read as Parquet"),
        (lambda: Path("c/a").write_bytes(lines(TEXTS)), r"c/a is no Parquet file: it begins as JSON; .* jsonl:GLOB"),
        (lambda: Path("c/a").write_bytes(b""), r"c/a is no Parquet file: it is empty; .* parquet:FOLDER/\*.parquet"),
        (
            lambda: Path("c/a").write_bytes(gzip.compress(b"PAR1")),
            r"it is packed once more; unpack it: gunzip -k 'c/a'",
        ),
        (lambda: Path("c/a").write_bytes(b"PARE" + bytes(90)), r"c/a is Parquet, encrypted, not a Parquet file"),
        (
            lambda: Path("c/a").write_bytes(b"ARROW1\0\0"),
            r"c/a is Arrow, not a Parquet file; write its texts as Parquet",
        ),
    ],
)
def test_parquet_that_has_no_text_is_refused_with_why(here: Path, make: Callable[[], Any], words: str) -> None:
    make()
    with pytest.raises(DatasetError, match=words):
        texts("parquet:c/a")


def test_parquet_that_has_no_rows_of_its_own(here: Path) -> None:
    """What Spark writes beside the files of a folder."""
    kept: list[Any] = []
    rows = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_to_dataset(rows, "c", metadata_collector=kept)
    pyarrow.parquet.write_metadata(rows.schema, "c/_metadata", metadata_collector=kept)
    with pytest.raises(DatasetError, match=r"c/_metadata does not read as Parquet.*parquet:FOLDER/\*.parquet"):
        texts("parquet:c/*")
    assert texts("parquet:c/*.parquet") == TEXTS


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pyarrow.array([1, 1 << 30], pyarrow.date32()), "date32"),
        (pyarrow.array([1, 1 << 60], pyarrow.timestamp("us")), "timestamp"),
        (pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Mars/Phobos")), "Mars/Phobos"),
    ],
    ids=["date", "time", "zone"],
)
def test_a_value_that_python_has_not_is_told_with_its_column(here: Path, column: Any, says: str) -> None:
    table("c/a", text=["a", "b"], at=column)
    assert texts("parquet:c/a") == ["a", "b"]
    with pytest.raises(DatasetError, match=rf"c/a, rows 1 to 2: the column 'at' of type .*{says}"):
        texts("parquet:c/a", filter={"predicate": "os.path:exists"})


@pytest.mark.parametrize("mark", ["_delta_log/0.json", ".hoodie/x", "metadata/v1.metadata.json"])
def test_a_table_whose_files_hold_former_rows_is_told(here: Path, caplog: pytest.LogCaptureFixture, mark: str) -> None:
    Path("c/day=1").mkdir()
    table("c/day=1/a.parquet", text=TEXTS)
    source = open_source(spec_of("parquet:c/**/*.parquet"))
    source.look()
    assert not caplog.records
    Path("c", mark).parent.mkdir()
    Path("c", mark).write_text("{}")
    source.look()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("'c' is a table of ")
    assert "rows that were deleted or replaced since" in told


def test_large_rows_are_not_held_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table("c/a", 40, text=TEXTS, more=["x" * 99] * 30)
    monkeypatch.setattr(tables, "_BYTES", 500)
    file = pyarrow.parquet.ParquetFile("c/a")
    whole = pyarrow.parquet.ParquetFile.iter_batches
    sizes: list[int] = []

    def batches(self: Any, rows: int, *more: Any, **options: Any) -> Any:
        sizes.append(rows)
        return whole(self, rows, *more, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", batches)
    assert texts("parquet:c/a") == TEXTS
    assert sizes == [500 * 30 // file.metadata.row_group(0).column(1).total_uncompressed_size]


def test_parquet_whose_text_is_no_utf8(here: Path) -> None:
    bad = pyarrow.array([b"caf\xe9"] * 30).view(pyarrow.string())
    table("c/a", text=bad)
    with pytest.raises(DatasetError, match=r"c/a holds text that is no UTF-8 \(byte 0xE9\)"):
        texts("parquet:c/a")


def test_hugging_face_datasets(here: Path, small: Callable[[int], None]) -> None:
    import datasets

    rows = {"content": TEXTS, "language": ["en", "de", "fr"] * 10}
    datasets.Dataset.from_dict(rows).save_to_disk("c/one")
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict({"content": ["x"]})}
    ).save_to_disk("c/two")
    assert texts("hf:c/one", field="content") == TEXTS
    assert texts("hf:c/two?split=test", field="content") == ["x"]
    for number, form in enumerate(({"type": "numpy", "columns": ["language"]}, {"type": "arrow"}, {"type": "pandas"})):
        datasets.Dataset.from_dict(rows).with_format(**form).save_to_disk(f"c/form{number}")
        assert texts(f"hf:c/form{number}", field="content") == TEXTS
    german = spec_of("hf:c/one", field="content", filter={"language": ["de"]})
    Path("c/a.jsonl").write_bytes(lines(TEXTS[1::3]))
    want = prepare(spec_of("jsonl:c/a.jsonl"), open_store("memory:"))
    for size in (1 << 20, 700):
        small(size)
        assert prepare(german, open_store("memory:"), clock=never) == want
    for source, words in {
        "hf:c/two": "has several splits; it has train, test: name one",
        "hf:c/two?split=dev": "has no split 'dev'",
        "hf:c/none": "cannot be opened by datasets",
        "hf:c/one?split=train[:9]": r"has no split 'train\[:9\]': it is one table, all of whose rows are read",
    }.items():
        with pytest.raises(DatasetError, match=words):
            texts(source, field="content")
    with pytest.raises(DatasetError, match="has no column 'text'; its columns are 'content', 'language'"):
        texts("hf:c/one")
    views = pyarrow.table({"content": pyarrow.array(TEXTS, pyarrow.string_view()), "text": pyarrow.array([b"x"] * 30)})
    datasets.Dataset(views).save_to_disk("c/views")
    assert texts("hf:c/views", field="content") == TEXTS
    with pytest.raises(
        DatasetError, match=r"'text' is of type binary, not of text; columns of text are content \(data"
    ):
        texts("hf:c/views")
    for name in ("train", "test"):
        Path("c/many").mkdir(exist_ok=True)
        Path(f"c/many/{name}.jsonl").write_bytes(lines(TEXTS))
    Path("c/many/README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n- config_name: b\n  data_files: test.jsonl\n---\n"
    )
    with pytest.raises(DatasetError, match=r"\['a', 'b'\].*; name one of them, hf:…\?name=…"):
        texts("hf:c/many")
    Path("c/mixed").mkdir()
    Path("c/mixed/a.jsonl").write_text('{"text": "a"}\n')
    Path("c/mixed/b.jsonl").write_text('{"text": "b", "more": 1}\n')
    with pytest.raises(DatasetError, match=r"Couldn't cast .*; its files differ in their columns: jsonl:GLOB and parq"):
        texts("hf:c/mixed")
    Path("c/script").mkdir()
    Path("c/script/script.py").touch()
    Path("c/script/a.jsonl").write_bytes(lines(TEXTS))
    with pytest.raises(DatasetError, match=r"found script.py; take the script out of the folder, .*convert/parquet"):
        texts("hf:c/script")
    Path("c/script/script.py").unlink()
    assert texts("hf:c/script") == TEXTS
    Path("c/many/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: gone.jsonl\n---\n")
    with pytest.raises(DatasetError, match=r"Unable to find '.*/gone.jsonl'; its README.md names it"):
        texts("hf:c/many")
    Path("c/tables").mkdir()
    Path("c/tables/a.csv").write_text("n,text\n1,one\n2,two\n")
    assert texts("hf:c/tables") == ["one", "two"]
    with pytest.raises(SpecError, match="unknown option 'splits'"):
        texts("hf:c/one?splits=x")
    with pytest.raises(SpecError, match="what save_to_disk wrote has no revision; leave that out"):
        texts("hf:c/one?revision=x")


# --- code ---------------------------------------------------------------------------------------------------


def test_a_folder_of_code(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "src/a.py": b"x = 1\r\n",
        "src/b.C": b"int x;\n",
        "Makefile": b"all:\n",
        "latin.py": b"caf\xe9\n",
        "bin.py": b"x\0y",
        "large.json": b"1" * (1 << 20) + b"1",
        "picture.png": b"\x89PNG",
        ".git/config.py": b"no",
        "node_modules/m/i.js": b"no",
    }
    for name, data in files.items():
        path = Path("c", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    Path("c/src/up").symlink_to("..")
    Path("c/empty").mkdir()
    found = {doc.name: (doc.text, doc.fields["language"]) for doc in documents("code:c")}
    assert found == {
        "c/Makefile": ("all:\n", "makefile"),
        "c/src/a.py": ("x = 1\n", "python"),
        "c/src/b.C": ("int x;\n", "c"),
    }
    told = [record.getMessage() for record in caplog.records]
    assert sorted(line.partition(":")[0] for line in told) == ["c/bin.py", "c/latin.py"]
    assert texts("code:c", filter={"language": ["c"]})  # a filter is not the source's
    for source, words in {
        "c/none": "does not exist",
        "c/Makefile": "is a file",
        "c/empty": "no file",
    }.items():
        with pytest.raises(DatasetError, match=words):
            texts(f"code:{source}")
