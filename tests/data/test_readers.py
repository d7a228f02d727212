"""Readers: what each makes of a few lines of its kind of source."""

import gzip
import io
import json
import zipfile

from dsmoe_jax.data import readers, stdlib
from dsmoe_jax.data.documents import Document, num_bytes


def _members(text: str, name: str = "dir/file") -> list[tuple[str, bytes]]:
    return [(name, text.encode("utf-8"))]


def _zipped(text: str) -> list[tuple[str, bytes]]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("table.csv", text)
    return [("table.zip", buffer.getvalue())]


def test_plays_are_cut_into_scenes_of_one_group():
    play = "# Title\n\n### SCENE I\nline\n\n### SCENE II\nother\n"
    found = list(readers.plays(_members(play, "p.md")))
    assert [d.text for d in found] == [
        "# Title\n\n",
        "### SCENE I\nline\n\n",
        "### SCENE II\nother\n",
    ]
    assert {d.group for d in found} == {"p.md"}


def test_longest_literal_is_parsed_not_run():
    source = 'raise SystemExit\nx = "short"\ny = """\nIn the beginning\n"""\n'
    assert list(readers.longest_literal(_members(source))) == [Document("In the beginning")]


def test_news_groups_by_title():
    table = 'title,text\nA storm,"First, text"\na STORM ,second\n'
    assert list(readers.news_table(_zipped(table))) == [
        Document("A storm\n\nFirst, text\n", group="a storm"),
        Document("a STORM\n\nsecond\n", group="a storm"),
    ]


def test_speeches_leave_out_interjections():
    speech = "Sehr geehrte Damen und Herren, " * 4
    found = list(readers.speech_table(_zipped(f'speaker,text\nx,Hört!\ny,"{speech}"\n')))
    assert len(found) == 1


def test_tagged_news_loses_its_tags():
    line = "［/w [中国/ns  政府/n]nt  １９９８年/t  ——/w  1/2/m\n"
    (document,) = readers.tagged_news(_members(line))
    assert document.text == "［中国政府１９９８年——1/2\n"


def test_one_per_line():
    found = [d.text for d in readers.one_per_line(_members("好\n\n 不好 \r\n"))]
    assert found == ["好\n", "", "不好\n"]


def test_docstrings_with_formulas_only():
    source = (
        'class A:\n    r"""The sum :math:`a + b`."""\n'
        '    def f(self):\n        """No formula."""\ndef g():\n    r"""$x^2$"""\n'
    )
    found = list(readers.docstrings_with_formulas(_members(source, "a.py")))
    assert sorted(d.text for d in found) == ["$x^2$\n", "The sum :math:`a + b`.\n"]
    assert list(readers.docstrings_with_formulas(_members(source, "tests/a.py"))) == []


def test_dialogues():
    text = (
        "categories:\n- AI\nconversations:\n"
        "- - What is AI?\n  - 'It''s a\n    field.'\n- - 你好\n  - 你好吗\n"
    )
    found = [d.text for d in readers.dialogues(_members(text))]
    assert found == ["What is AI?\nIt's a field.\n", "你好\n你好吗\n"]


def test_service_documentation():
    long = "<p>Creates a thing with a name. " + "More is said here. " * 8 + "</p>"
    model = {"documentation": "short", "shapes": [{"documentation": long}, {"documentation": long}]}
    members = [
        ("botocore/data/s3/2006/service-2.json.gz", gzip.compress(json.dumps(model).encode()))
    ]
    (document,) = readers.service_documentation(members)
    assert document.group == "s3"
    assert document.text.count("Creates a thing") == 1
    assert "<p>" not in document.text


def test_whole_files_without_tests():
    members = [*_members("a", "m/a.py"), *_members("b", "m/tests/b.py")]
    assert list(readers.whole_files(members)) == [Document("a")]


def test_the_standard_library_has_enough_text():
    for read in (stdlib.language_reference, stdlib.builtin_docstrings, stdlib.character_names):
        documents = list(read())
        assert len(documents) > 20
        assert sum(num_bytes(d.text) for d in documents) > 100_000
