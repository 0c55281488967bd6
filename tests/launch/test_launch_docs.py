"""docs/launch.md: what it quotes is what the program prints, what it runs is there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/launch.md").read_text()


def texts():
    """Every text of the program; what it puts into one is a hole, written as `…`."""
    for path in [*ROOT.glob("lumina_jax/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[-.\d]*[a-z]", "…", node.value)
    for path in [*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"]:
        yield re.sub(r"\$\{[^}]*\}|\$\w+", "…", path.read_text())


def rows(section):
    """The first two cells of each row of the first table below a heading."""
    below = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = re.search(r"(?m)(^\|.*\n)+", below)[0]
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")][:2]


MESSAGES = [re.search("`([^`]+)`", cells[0])[1] for cells in rows("Troubleshooting")]
OF_OTHERS = {"RESOURCE_EXHAUSTED"}  # XLA's own word


@pytest.fixture(scope="module")
def all_texts():
    return [re.sub(r"\d+", "…", text) for text in texts()]


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_of_the_table_is_one_that_the_program_prints(message, all_texts):
    message = re.sub(r"\d+", "…", message)
    assert message in OF_OTHERS or any(message in text for text in all_texts)


def test_the_page_has_the_statuses_of_verdict_sh():
    judged = dict(
        re.findall(r"(?m)^    ([\d |]+)\) echo '?(\w+)", (ROOT / "launch/verdict.sh").read_text())
    )
    told = " ".join(f"{status} -> {then};" for status, then in rows("When it stops"))
    assert judged == {"0": "done", "2 | 130": "stop", "75 | 143": "again"}
    assert next(status for status, _ in rows("When it stops")) == "0"
    for codes in ("75, 143", "2, 130", "1, 134"):
        assert codes in told


def test_every_file_and_heading_that_is_linked_is_there():
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", PAGE):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        page = PAGE if not path else None
        if path:
            where = (ROOT / "docs" / path).resolve()
            assert where.exists(), text
            page = where.read_text() if where.suffix == ".md" else None
        if heading:
            there = re.findall(r"(?m)^#+ (.*)$", page)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in there}
            assert heading in slugs, target
