"""The report as a browser and a screen reader would take it apart, made through the command line once."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import write_synthetic_run

from analysis.report import main

REPOSITORY = Path(__file__).resolve().parents[2]
_VOID = {"meta", "img", "source", "br", "link", "input"}


class Page(HTMLParser):
    """Every start tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and what the command printed, from six synthetic runs, one of them diverged."""
    root = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        write_synthetic_run(root, "lora", seed, top1=88.0 + seed)
        write_synthetic_run(root, "snell", seed, top1=93.0 + seed)
    # Its name stands in cells, labels, attributes, alternative texts and the data of the script.
    write_synthetic_run(root, '<u title="x">', 0, label="odd", top1=70.0)
    failure = {"status": "diverged", "message": "loss <b>nan</b> & worse", "best_step": None}
    write_synthetic_run(root, "gps", 0, top1=None, **failure)
    command = [sys.executable, "-m", "analysis.report", str(root / "study"), "--output", str(root / "out")]
    command += ["--title", "A <i>title</i>", "--note", 'Made-up "figures" & so on.']
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return root / "out", done.stdout


@pytest.fixture(scope="module")
def page(made: tuple[Path, str]) -> Page:
    return Page((made[0] / "report.html").read_text(encoding="utf-8"))


def test_command_prints_the_table_and_the_place(made: tuple[Path, str]) -> None:
    folder, out = made
    assert "93.5 ± 0.7" in out
    assert "diverged" in out
    assert out.rstrip().endswith(f"The report is {folder / 'report.html'}")


def test_files(made: tuple[Path, str]) -> None:
    names = sorted(path.name for path in made[0].iterdir())
    stems = ("accuracy-memory", "memory-categories", "pareto", "training-curves")
    pictures = [f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")]
    assert names == sorted([*pictures, "report.html", "table.csv", "table.md", "table.tex"])
    assert all((made[0] / name).stat().st_size > 5_000 for name in pictures)


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name)
    assert page.all("link") == []
    assert not any("src" in script for script in page.all("script"))
    policy = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert len(policy) == 1
    assert str(policy[0]).startswith("default-src 'none'")


def test_pictures_are_inlined_for_light_and_dark_with_words(page: Page) -> None:
    images, sources = page.all("img"), page.all("source")
    assert len(images) == len(sources) == 4
    for image, source in zip(images, sources, strict=True):
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")
        assert str(source["media"]) == "(prefers-color-scheme: dark)"
        assert len(str(image["alt"])) > 40


def test_tables_can_be_read_aloud_and_sorted(page: Page) -> None:
    assert {table.get("id") for table in page.all("table")} == {
        "comparison-table",
        "methods-table",
        "runs-table",
        "environment-table",
    }
    assert len(page.all("caption")) == 4
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    regions = [division for division in page.all("div") if division.get("role") == "region"]
    assert len(regions) == 4
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for region in regions:
        assert region["tabindex"] == "0"
        assert region["aria-labelledby"] in identifiers
    # Headings of comparison, methods and runs; the filter's Clear; Previous and Next of the tables.
    assert len(page.all("button")) == 13 + 10 + 12 + 1 + 6
    sorts = [cell.get("data-sort") for cell in page.all("td")]
    assert "93.5" in sorts
    assert "nan" not in sorts


def test_links_of_the_page_lead_somewhere(page: Page) -> None:
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = {str(link["href"])[1:] for link in page.all("a")}
    assert targets == {"summary", "comparison", "methods", "plots", "runs", "reproduce", "environment"}
    assert targets <= identifiers


def test_everything_is_escaped(page: Page) -> None:
    assert "A <i>title</i>" in page.text
    assert "loss <b>nan</b> & worse" in page.text
    assert 'Made-up "figures" & so on.' in page.text
    # Rows of the comparison, the methods and the runs, the note on its one seed, and the choice of methods.
    assert page.text.count('<u title="x">') == 6
    assert all('<u title="x">' in str(image["alt"]) for image in page.all("img"))
    assert page.all("i") == page.all("b") == page.all("u") == []


def test_content(page: Page) -> None:
    assert "SNELL has the highest top-1 % on the test split: 93.5 ± 0.7 (2 seeds: 0, 1)." in page.text
    assert "1 of 6 runs did not end well" in page.text
    assert "the validation split chose the weights" in page.text
    assert len(re.findall(r"snell-scale run \S+/config\.yaml output_dir=again", page.text)) == 6
    assert "packages.torch" in page.text
    assert "2.13.0" in page.text


def test_a_report_of_failures_alone_is_still_a_report(tmp_path: Path) -> None:
    nothing = {"memory": None, "throughput": {}, "seconds": {}, "file_size": None, "metric": None}
    write_synthetic_run(tmp_path, "lora", 0, top1=None, status="failed", curve=(), **nothing)
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "No run has a score on the test split to report." in page.text
    assert page.all("img") == []


def test_the_scripts_data_ends_no_script_and_reads_back(made: tuple[Path, str]) -> None:
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    inside = text.partition('<script type="application/json" id="runs-data">')[2].partition("</script>")[0]
    assert "<" not in inside
    names = {run["label"] for run in json.loads(inside)["runs"]}
    assert names == {"LoRA", "SNELL", "GPS", '<u title="x">'}


def test_out_of_memory_and_predicted_rows_are_rows(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, "full", 0, top1=None, status="oom", message="needs 92 GiB")
    write_synthetic_run(tmp_path, "lora", 0)
    write_synthetic_run(tmp_path, "lora", 1, top1=None, predicted=True, world_size=64, engine="fsdp2", curve=())
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert "needs 92 GiB" in text
    assert "lora-seed1/config.yaml --world-size 64" in text
    assert "Predicted, not measured: 1 of them." in text
    assert "predicted" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_of_more_rows_than_a_picture_holds_there_are_no_files(tmp_path: Path) -> None:
    for r in range(41):
        varied = {"method.name": "lora", "method.r": r}
        write_synthetic_run(tmp_path, "lora", 0, label=f"r{r}", varied=varied)
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.png"))
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "There are pictures in files of 40 rows at most" in page.text
    assert len(page.all("figure")) == 3


def test_allocation_and_ranks_of_layers_are_shown(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, "snella", 0)
    lines = [{"step": step, **{f"sparsity/blocks.0.mlp.fc1/{i}": 0.1 * step for i in (0, 1)}} for step in (1, 2)]
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "SNELLA's allocation over layers and time" in page.text
    assert "allocation" in [shown["id"] for shown in page.all("figure")]
    assert (tmp_path / "out" / "allocation.pdf").is_file()


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
