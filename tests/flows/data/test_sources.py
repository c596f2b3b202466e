"""Every kind of source gives the same documents, in pieces too; what is wrong with one is said with where it is."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from checkpoint.errors import CredentialsRefused, StoreError, StoreRefused, StoreUnavailable
from checkpoint.store import open_store
from checkpoint.store.s3_address import open_s3
from flows.data import documents, prepare, validation_of
from flows.data.sources import open_source
from flows.data.sources.base import Borne
from tests.flows.data.test_pieces import decoded, never
from tests.support.place import Place
from tests.support.s3_server import S3Server
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
        (lambda: table("c/a", text=[None] * 30), r"column 'text' is of type null, not of text"),
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
        (lambda: Path("c/a").write_bytes(b"ARROW1\0\0"), r"c/a is Arrow, not a Parquet file; write its texts as JSON"),
    ],
)
def test_parquet_that_has_no_text_is_refused_with_why(here: Path, make: Callable[[], Any], words: str) -> None:
    make()
    with pytest.raises(DatasetError, match=words):
        texts("parquet:c/a")


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
    }.items():
        with pytest.raises(DatasetError, match=words):
            texts(source, field="content")
    with pytest.raises(DatasetError, match="has no column 'text'; its columns are 'content', 'language'"):
        texts("hf:c/one")
    with pytest.raises(SpecError, match="unknown option 'splits'"):
        texts("hf:c/one?splits=x")


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


# --- buckets ------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(server: S3Server) -> Iterator[Callable[..., str]]:
    """Puts objects under a prefix of their own; gives the address of a pattern there."""
    prefix = f"corpus-{random.randrange(1 << 40):x}"
    with server.identity("root"):
        client = open_s3(server.url()).client

        def fill(pattern: str, **objects: bytes) -> str:
            for name, data in objects.items():
                client.put_object(Bucket="hotstage", Key=f"{prefix}/{name}", Body=data)
            return f"s3://hotstage/{prefix}/{pattern}?endpoint={server.endpoint}&region=us-east-1"

        yield fill


def test_a_corpus_in_a_bucket(bucket: Callable[..., str], here: Path, small: Callable[[int], None]) -> None:
    table("c/t.parquet", text=TEXTS[20:])
    where = bucket(
        "**/*",
        **{
            "a b/ü [1].jsonl": lines(TEXTS[:9]),
            "a b/ü [2].jsonl.gz": gzip.compress(lines(TEXTS[9:20])),
            "t.parquet": Path("c/t.parquet").read_bytes(),
        },
    )
    assert texts("jsonl:" + where.replace("**/*", "**/*.jsonl*")) == TEXTS[:20]
    assert texts("jsonl:" + where.replace("**/*", "a b/ü [[]1].jsonl")) == TEXTS[:9]
    assert texts("parquet:" + where.replace("**/*", "*.parquet")) == TEXTS[20:]
    Path("c/a.jsonl").write_bytes(lines(TEXTS[:20]))
    want = prepare(spec_of("jsonl:c/a.jsonl"), open_store("memory:"))
    small(300)
    store = open_store("memory:")
    spec = spec_of("jsonl:" + where.replace("**/*", "*/*"))
    assert prepare(spec, store) == want
    assert len(list(store.list("data/seen/"))) == 1  # an ETag is of the content
    assert prepare(spec, store) == want
    with pytest.raises(DatasetError, match=r"matches no object: 3 begin with .* and none of them fits"):
        texts("jsonl:" + where.replace("**/*", "*.txt"))


def test_an_object_that_changes_while_it_is_read(bucket: Callable[..., str]) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS), "b.jsonl": lines(TEXTS)})
    source = open_source(spec_of("jsonl:" + where))
    first, second = source.look()
    bucket("*", **{"a.jsonl": lines(TEXTS[1:])})
    with pytest.raises(DatasetError, match=r"a.jsonl.* changed while it was read"):
        list(source.read(first, 0, -1, Borne()))
    assert len(list(source.read(second, 0, -1, Borne()))) == len(TEXTS)


def test_a_bucket_without_rights(bucket: Callable[..., str], server: S3Server) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS)})
    other = where.replace("s3://hotstage/", "s3://not-there/")
    with pytest.raises(StoreError, match="not-there"):
        texts("jsonl:" + other)
    _fresh()
    with server.identity("agent"), pytest.raises(StoreRefused, match=r"data.source 's3://.*a.jsonl") as caught:
        texts("jsonl:" + where)
    assert caught.value.exit_code == 78


def test_credentials_that_nobody_knows(bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS)})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    _fresh()
    with pytest.raises(CredentialsRefused, match=r"data.source 'jsonl:s3://"):
        texts("jsonl:" + where)


def test_a_server_that_is_not_there_is_told_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StoreUnavailable, match=r"data.source 'jsonl:s3://bucket/.*endpoint=http://127.0.0.1:9"):
        texts("jsonl:s3://bucket/*.jsonl?endpoint=http://127.0.0.1:9&path_style=1")


@pytest.fixture(autouse=True)
def _no_store_of_before() -> None:
    _fresh()


def _fresh() -> None:
    """As in a process of its own: buckets are opened with the credentials of now."""
    from flows.data.sources import objects

    objects._local.__dict__.clear()


# --- which stay ---------------------------------------------------------------------------------------------


def test_a_filter_chooses_by_length_language_and_predicate(here: Path, small: Callable[[int], None]) -> None:
    tags = ["en", "en-GB", "EN_us", "eng", "de", None, "", 7]
    rows = [{"text": f"{'x' * (20 + n)} {n}", "lang": tags[n % 8], "n": n} for n in range(64)]
    Path("c/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rules.py").write_text("def even(document):\n    return document.fields['n'] % 2 == 0\n")
    stay = [r for r in rows if 30 <= len(r["text"]) <= 70 and r["lang"] in tags[:3] and r["n"] % 2 == 0]  # type: ignore[arg-type,operator]
    Path("c/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stay))
    rule = {"min_length": 30, "max_length": 70, "language": ["en"], "language_field": "lang", "predicate": "rules:even"}
    want = prepare(spec_of("jsonl:c/b.jsonl"), open_store("memory:"))
    for size in (1 << 20, 300):
        small(size)
        said: list[str] = []
        got = prepare(spec_of("jsonl:c/a.jsonl", filter=rule), open_store("memory:"), say=said.append, clock=never)
        assert got == want
        assert f"leaves {len(stay)} of 64 documents" in said[0]
        assert "without a language tag" in said[0]
    sys.modules.pop("rules", None)


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ({"min_length": 900}, DatasetError, "leaves no text of .*: 30 documents, of them 30 too short; loosen it"),
        ({"language": ["en"]}, DatasetError, "30 without a language tag; loosen it"),
        ({"predicate": "rules_x:none"}, SpecError, "rules_x has no 'none'; it has answers, leaves, raises, refuses"),
        ({"predicate": "rules_y:f"}, SpecError, "there is no module 'rules_y'"),
        ({"predicate": "rules_z:f"}, SpecError, "importing 'rules_z' raised SyntaxError"),
        ({"predicate": "rules_w:f"}, SpecError, "importing 'rules_w' raised SystemExit: 3"),
        ({"predicate": "rules_x:leaves"}, DatasetError, r"raised SystemExit for c/a.jsonl:1: 4 \(line 5 of it\)"),
        ({"predicate": "rules_x:VALUE"}, SpecError, "is int, nothing to call"),
        ({"predicate": "rules_x:raises"}, DatasetError, r"raised KeyError for c/a.jsonl:1: 'x' \(line 2 of it\)"),
        ({"predicate": "rules_x:answers"}, DatasetError, "answered NoneType for c/a.jsonl:1; it must answer True"),
        ({"predicate": "rules_x:refuses"}, DatasetError, "30 refused by the predicate; loosen it"),
    ],
)
def test_a_filter_that_cannot_be(
    here: Path,
    rule: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    Path("c/a.jsonl").write_bytes(lines(TEXTS))
    Path("rules_x.py").write_text(
        "def raises(document):\n    return document.fields['x']\ndef answers(document): ...\n"
        "def leaves(document):\n    raise SystemExit(4)\n"
        "def refuses(document):\n    return False\nVALUE = 7\n"
    )
    Path("rules_w.py").write_text("import sys\nsys.exit(3)\n")
    Path("rules_z.py").write_text("def f(:\n")
    try:
        with pytest.raises(error, match=words):
            prepare(spec_of("jsonl:c/a.jsonl", filter=rule), open_store("memory:"))
    finally:
        sys.modules.pop("rules_x", None)
        sys.path.remove(str(here)) if str(here) in sys.path else None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"filter": {"min_length": 9, "max_length": 3}}, "max_length 3 is below min_length 9"),
        ({"filter": {"predicate": "rules"}}, "is no import path; write package.module:function"),
        ({"source": "text:*", "filter": {"language": ["en"]}}, "plain text has none"),
        ({"source": "dataset:" + "0" * 64, "dedupe": {}}, "dedupe is for a corpus that is prepared"),
        ({"source": "parquet:"}, "is unknown; take"),
        ({"source": "csv:a"}, "is unknown; csv is not read, so write its texts as JSON lines first"),
        ({"validation": 0.9}, "less than or equal to 0.5"),
        ({"dedupe": {"near": 0.2}}, "greater than or equal to 0.5"),
    ],
)
def test_keys_that_contradict_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataSpec.model_validate(data)


def test_the_command_exits_with_what_is_wrong(place: Place) -> None:
    (place.folder / "corpus" / "a.jsonl").write_bytes(lines(TEXTS))
    (place.folder / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-5])
    source = "data.source='jsonl:corpus/a.jsonl'"
    for code, words, *sets in (
        (65, "it was cut short", "data.source='jsonl:corpus/*.jsonl*'"),
        (78, "there is no module 'none'", source, "data.filter.predicate='none:f'"),
        (65, "loosen it", source, "data.filter.min_length=5000"),
        (78, "model.vocab 100 is smaller than the vocabulary of", source, "model.vocab=100"),
        (0, "dataset", source, "data.filter.min_length=50", "data.dedupe.exact=true", "data.validation=0.3"),
    ):
        done = place.here("data", "prepare", "spec.toml", *(word for s in sets for word in ("--set", s)))
        assert done.code == code, done.err
        assert words in done.err + done.out
        assert "Traceback" not in done.err


# --- duplicates ---------------------------------------------------------------------------------------------


def phrases_of(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def test_duplicates_are_those_that_a_slow_search_finds(
    here: Path,
    small: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exact ones by comparing all; near ones by the true Jaccard index of all pairs: all above 0.9 are joined, none of
    those that stay is, and nothing goes that has none above 0.65 to a document before it."""
    dice = random.Random(4)
    words = ["".join(dice.choices("abcdefgh", k=dice.randrange(2, 9))) for _ in range(900)]
    docs: list[str] = []
    for number in range(220):
        kind = dice.random()
        if docs and kind < 0.15:
            docs.append(dice.choice(docs))
        elif docs and kind < 0.6:
            base = dice.choice(docs).split(" ")
            for _ in range(dice.choice([1, 1, 2, 4, 9, 20])):
                base[dice.randrange(len(base))] = dice.choice(words)
            docs.append(" ".join(base))
        else:
            docs.append(" ".join([str(number), *dice.choices(words, k=160)]))
    docs += ["", "", "?!", "?!", "one two", "one two three"]
    Path("c/a.jsonl").write_bytes(lines(docs))
    exact = list(dict.fromkeys(docs))
    assert len(exact) < len(docs) - 20

    def kept(near: float | None, size: int) -> list[str]:
        small(size)
        store = open_store("memory:")
        spec = spec_of("jsonl:c/a.jsonl", dedupe={"near": near}, vocab_size=2000)
        made = prepare(spec, store, clock=never)
        return decoded(store, made)

    monkeypatch.setattr("flows.data.duplicates._SORTED", 64)
    assert kept(None, 5000) == exact
    left = kept(0.8, 1 << 20)
    assert left == kept(0.8, 5000)
    assert set(left) < set(exact)
    known = {text: phrases_of(text) for text in exact}

    def alike(one: str, other: str) -> float:
        return len(known[one] & known[other]) / len(known[one] | known[other])

    gone = [text for text in exact if text not in set(left)]
    assert len(gone) > 20
    for text in gone:
        assert max(alike(text, before) for before in exact[: exact.index(text)]) > 0.65
    for number, text in enumerate(left):
        if text.split():
            assert all(alike(text, before) < 0.9 for before in left[:number] if before.split())


def test_a_signature_is_what_it_was() -> None:
    """Of November 2026: datasets whose near duplicates were left out stay what they are."""
    from flows.data.near import bands, signature

    made = signature("the quick brown fox jumps over the lazy dog and runs into the dark wood")
    assert made is not None
    assert (made[:4].tolist(), bands(0.8)) == ([137905809, 310832666, 660828224, 64184630], (21, 6))


def test_validation_has_no_text_of_the_training(here: Path) -> None:
    """The same text is on one side, wherever and how often it stands."""
    Path("c/a.jsonl").write_bytes(lines(TEXTS + TEXTS[::-1]))
    Path("c/b.jsonl").write_bytes(lines([*TEXTS[:15], "another one"]))
    store, sides = open_store("memory:"), []
    for source in ("jsonl:c/a.jsonl", "jsonl:c/b.jsonl"):
        train = prepare(spec_of(source, validation=0.3), store)
        held = validation_of(store, train)
        assert held is not None
        sides.append((set(decoded(store, train)), set(decoded(store, held))))
    assert not (sides[0][0] | sides[1][0]) & (sides[0][1] | sides[1][1])
