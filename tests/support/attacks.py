"""What came of the attacks that are tests: `make attack` runs the tests marked `attack`, and this makes their table."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from tests.support import ROOT

AREAS = {
    "network": "a server and its clients between machines: strangers, keys, sizes",
    "local": "a federation on a machine with other users: processes, ports, signals",
    "introductions": "clients that lie about who they are and what they have",
    "numbers": "clients whose numbers or sizes are hostile",
    "messages": "messages that are malformed, replayed or exchanged",
    "server": "a server that is hostile to its clients",
    "store": "the store of runs: kills, races, hostile folders, links",
    "data": "files of data, and downloads of them",
    "page": "the page of figures, and words of the command line",
}
BEGIN, END = "<!-- made by make attack -->\n", "<!-- end of the table -->"


def outcomes(
    files: Iterable[str | Path],  # pytest's --junitxml
) -> dict[str, Counter]:  # area → how many were tried, survived, skipped
    "Count a test as one attack."
    found = {area: Counter() for area in AREAS}
    for case in (case for file in files for case in ElementTree.parse(file).getroot().iter("testcase")):
        for area in (p.get("value") for p in case.iter("property") if p.get("name") == "attack"):
            bad = case.find("failure") is not None or case.find("error") is not None
            how = "skipped" if case.find("skipped") is not None else "failed" if bad else "survived"
            found[area] += Counter({how: 1} if how == "skipped" else {"tried": 1, how: 1})
    return found


def table(
    found: dict[str, Counter],  # from `outcomes`
) -> str:
    "As Markdown."
    rows = [(f"{area}: {AREAS[area]}", n["tried"], n["survived"]) for area, n in found.items() if n["tried"]]
    rows.append(("**all**", *(sum(row[k] for row in rows) for k in (1, 2))))
    lines = ["| area | tried | survived |", "|---|---|---|", *(f"| {name} | {t} | {s} |" for name, t, s in rows)]
    return "\n".join(lines) + "\n"


def put(
    text: str,
    page: Path,
) -> None:
    "Put the table into a page, between its two comments."
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page}: has no place for the table: {BEGIN.strip()} ... {END}")
    page.write_text(f"{before}{BEGIN}{text}{END}{after}", "utf-8")


def main(
    files: list[str],
) -> int:  # exit status: 0 if all attacks that were tried are survived
    "The command: print the table, and put it into the documentation if no attack was skipped."
    found = outcomes(files)
    print(text := table(found))
    if skipped := sum(n["skipped"] for n in found.values()):
        print(f"{skipped} attacks were skipped, as said above: docs/security.md is left as it is")
    else:
        put(text, ROOT / "docs" / "security.md")
    return int(any(n["failed"] for n in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
