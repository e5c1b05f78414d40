"""The report as a whole: one file, valid, the same for equal rows, and what its figures are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import rows as made
from click.testing import CliRunner

from conserve_serving.cli.report import report
from conserve_serving.lab.cell import FORMAT, Cell, run_cell
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.contenders import contender
from conserve_serving.lab.errors import LabError
from conserve_serving.lab.report import SECTIONS, Claim, Condition, Outcome, PaperValue, render
from conserve_serving.lab.report.metrics import METRICS
from conserve_serving.lab.stats import mean, ratio
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.replay.report import format_number

EVIL = "<script>alert('&')</script> |`*"
_SVG_EMPTY = frozenset({"path", "use", "rect"})


class Page(HTMLParser):
    """Checks that tags close, and collects what a browser would load and the cells of tables."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SVG_EMPTY, f"<{tag}/> is not empty in HTML"
        self._tag(tag, attrs)

    def _tag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "data"}]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "small":
            self.rows[-1][-1] += f" {data}"


def every_kind_of_row() -> list[dict[str, Any]]:
    rows = made.rows(("conserve", "collocated", "per_turn_10_wrong", "oracle"), (1.0, 1.6), 3)
    rows += made.rows(("conserve", "collocated"), (1.0, 1.6), 3, mixed_slowdown=1.5)
    unlike = made.cluster("unlike", profile="a100-qwen3-8b")
    unlike["groups"][0]["profile"] = "h100-qwen3-8b"
    rows += made.rows(("conserve", "collocated"), (1.0, 1.6), 3, on=unlike)
    return rows


@pytest.fixture(scope="module")
def page() -> str:
    return render(
        every_kind_of_row(),
        title=EVIL,
        claims=[
            Claim(
                claim="p95 TTFET",
                paper="−51.08 %",
                ours=mean([-30.0, -34.0, -32.0]),
                unit="%",
                outcome=Outcome.PARTLY,
                loads="1.6",
                reason=EVIL,
            )
        ],
        paper=[PaperValue(contender="conserve", metric="ttfet", rate_per_s=1.6, value=4.07)],
        rate_per_s=1.6,
        conditions_given=[Condition(name="weather", value="fair", confidence="assumed")],
        capacities={},
    ).html


def test_the_page_is_one_well_formed_file_that_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") > 10
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert all(target.startswith("#") for target in parsed.loads)
    assert {target[1:] for target in parsed.loads} <= set(parsed.ids)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "url(#" in page
    assert "@import" not in page


def test_ids_are_unique_but_for_equal_definitions(page: str) -> None:
    """Two pictures may share a definition only where it is the same."""
    definitions: dict[str, str] = {}
    for found in re.finditer(r'<(?:path|clipPath) id="([^"]+)"[^>]*?(?:/>|>.*?</clipPath>)', page):
        assert definitions.setdefault(found.group(1), found.group()) == found.group()
    referred = set(re.findall(r'(?:url\(#|<use href="#)([\w.-]+)', page))
    assert referred <= set(definitions)


def test_names_cannot_become_markup(page: str) -> None:
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_colours_are_the_page_s_so_that_dark_works(page: str) -> None:
    drawn = "".join(re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL))
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn))
    assert "var(--accent)" in colours
    assert all(c == "none" or c.startswith("var(--") for c in colours)
    assert page.count("--accent:") == 2  # light and dark
    assert "prefers-color-scheme: dark" in page


def test_equal_rows_give_an_equal_file_whatever_is_configured(page: str) -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.6), 3)
    arguments: dict[str, Any] = {"title": "t", "capacities": {}}
    one = render(rows, **arguments)
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        other = render(json.loads(json.dumps(rows)), **arguments)
    assert one == other
    assert not re.search(r"20\d\d-\d\d-\d\dT", one.html)


def test_a_large_report_stays_small() -> None:
    rows = made.rows(tuple(made.STRENGTHS), (0.5, 0.75, 1.0, 1.25, 1.5, 1.634), 2)
    html = render(rows, title="t", sections=("curves", "bars", "where")).html
    assert len(html.encode()) < 600_000


def test_sections_can_be_chosen_and_unknown_ones_are_refused() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0,), 2)
    html = render(rows, title="t", sections=("conditions",)).html
    assert 'id="conditions"' in html
    assert 'id="bars"' not in html
    with pytest.raises(LabError, match=r"no section 'bar'.*bars"):
        render(rows, title="t", sections=("bar",))


# --- figures --------------------------------------------------------------------------------------


def p95s(rows: list[dict[str, Any]], label: str, rate: float) -> list[float]:
    return [
        row["latency"]["ttfet_s_normalized"]["p95"]
        for row in sorted(rows, key=lambda row: row["cell"]["workload"]["seed"])
        if row["cell"]["contender"]["label"] == label
        and row["cell"]["workload"]["rate_per_s"] == rate
    ]


def test_tables_have_the_statistics_of_the_rows() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 5)
    parsed = Page(render(rows, title="t", sections=("curves", "bars"), rate_per_s=1.5).html)
    said = {tuple(row[:2]): row[2] for row in parsed.rows if len(row) > 6}
    for label in ("conserve", "collocated"):
        for rate in (1.0, 1.5):
            whole = mean(p95s(rows, label, rate))
            text = f"{format_number(whole.value)} "
            text += f"[{format_number(whole.low)}, {format_number(whole.high)}]"
            assert said[f"{rate:g}", label] == text
    change = ratio(p95s(rows, "conserve", 1.5), p95s(rows, "collocated", 1.5))
    against = next(r[3] for r in parsed.rows if r[:2] == ["TTFET, p95", "collocated"])
    assert f"{100 * (change.value - 1):+.1f} %".replace("-", "−") in against
    assert f"{100 * (change.low - 1):+.1f}, ".replace("-", "−") in against


def test_what_was_moved_lost_and_computed_again_stands_below_the_bars() -> None:
    rows = made.rows(["conserve", "collocated"], [1.0], seeds=4)
    page = Page(render(rows, title="x", sections=["bars"]).html)
    found = next(row for row in page.rows if row[0] == "conserve" and "p0" in row[-1])
    d0 = sum(row["engines"]["d0"]["busy"] for row in rows[:4]) / 4
    # Of seeds 0 to 3: transfers 1.0 to 1.3, computed again 0 to 3 %, put back 0 to 6.
    busy = f"p0 30 %, d0 {100 * d0:.0f} %"
    assert found == ["conserve", "1.15", "4,000", "1.5 %", "3", busy]


def test_the_paper_s_figure_stands_beside_the_contender_of_that_name_only() -> None:
    rows = made.rows(("conserve", "collocated"), (1.5,), 2)
    rows += [made.row(policy="conserve", label="conserve-hosting", rate_per_s=1.5)]
    paper = [PaperValue(contender="conserve", metric="ttfet", rate_per_s=1.5, value=4.07)]
    html = render(rows, title="t", sections=("bars",), paper=paper, rate_per_s=1.5).html
    told = {row[1]: row[3] for row in Page(html).rows if row[0] == "TTFET, p95"}
    assert told == {"conserve": "4.07", "conserve-hosting": "", "collocated": ""}
    columns = ["metric", "policy", "ours", "paper", "conserve against it"]
    assert Page(html).rows[0] == columns
    html = render(rows, title="t", sections=("bars",), rate_per_s=1.5).html
    assert Page(html).rows[0] == ["metric", "policy", "figure", "conserve against it"]
    others = [row for row in rows if row["cell"]["contender"]["policy"] == "collocated"]
    html = render(others, title="t", sections=("bars",)).html
    assert Page(html).rows[0] == ["metric", "policy", "figure"]


def test_one_load_is_marked_saturated_by_half_of_its_seeds() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 4)
    for row in rows:
        row["saturated"] = row["cell"]["workload"]["seed"] < 2
    html = render(rows, title="t", sections=("curves",)).html
    assert "2 of 4" in {row[-1] for row in Page(html).rows}
    solid = made.rows(("conserve", "collocated"), (1.0, 1.5), 4)
    hollow = "fill: var(--bg); stroke: var(--accent)"
    assert hollow in html
    assert hollow not in render(solid, title="t", sections=("curves",)).html


# --- loads ----------------------------------------------------------------------------------------

PER_TURN = ("per_turn_5_wrong", "per_turn_10_wrong")


def labels_of(html: str) -> list[str]:
    """Those of pictures at one load: of all but the curves."""
    found = re.findall(r'<svg class="plot"[^>]* aria-label="([^"]*)"', html)
    return [label for label in found if " against load, " not in label]


def headings(html: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", html)


@pytest.mark.parametrize(
    ("recorded", "at"), [(True, "at recorded arrivals"), (False, "at 1.5 conversations/s")]
)
def test_a_load_is_said_in_one_wording_in_titles_labels_tables_and_markdown(
    recorded: bool, at: str
) -> None:
    rows = made.rows(("conserve", "collocated", *PER_TURN), (1.5,), 3)
    rows += made.rows(("conserve", "collocated"), (1.5,), 3, mixed_slowdown=1.5)
    if recorded:
        rows = made.as_recorded(rows)
    page = render(rows, title="t", capacities={})
    found = labels_of(page.html)
    assert len(found) == 5 + 3 + 3 + 2 + 2 + 1  # bars, swept, predictions, tornados, where, power
    assert all(label.endswith(f" {at}") for label in found), found
    titles = headings(page.html)
    assert len(titles) == 6
    assert all(title.endswith(f" {at}") or "Power" in title for title in titles), titles
    name = "shop, 1,000 conversations, ≤ 5 turns" if recorded else "swebench, 1,000"
    assert all(name in title or "Power" in title for title in titles)
    assert f"on paper {at}</text>" in page.html  # the panel of the power model
    assert f"{at}, against" in page.html  # the losses
    for text in (page.html, page.markdown):
        assert at in text
        for wrong in ("as recorded/s", "as recorded conv", "recorded arrivals on paper at rec"):
            assert wrong not in text
        assert not re.search(r"\d/s", text)


def test_panels_of_the_power_model_name_the_workload_where_a_cluster_has_several() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0,), 2)
    rows += made.as_recorded(made.rows(("conserve", "collocated"), (1.0,), 2))
    html = render(rows, title="t", sections=("sensitivity",)).html
    assert "swebench on paper at 1 conversations/s</text>" in html
    assert "shop on paper at recorded arrivals</text>" in html
    far = made.cluster("32b-h100-3a100-kv80-of-somebody")
    html = render(made.rows(rates=(1.634,), on=far), title="t", sections=("sensitivity",)).html
    assert ">swebench on 32b-h100-3a100-kv80-of-somebody at 1.634</text>" in html
    assert ">conversations/s</text>" in html  # below it: a picture is 400 px wide


def test_recorded_arrivals_are_no_rate_of_a_curve_or_of_a_goodput() -> None:
    rows = made.as_recorded(made.rows(("conserve", "collocated"), (1.0,), 3))
    for rate in (1.0, 1.5):
        one = made.as_recorded(made.rows(("conserve", "collocated"), (rate,), 3))
        for row in one:
            row["cell"]["workload"]["rate_per_s"] = rate
            row["slo"]["all"] = 0.97 if rate < 1.5 else 0.5
        rows += one
        html = render(rows, title="t", sections=("curves", "tiers"), capacities={}).html
        assert ("against load" in html) == (rate == 1.5)
        assert ("at fewer than two rates" in html) == (rate == 1.0)
    figures = [row for row in Page(html).rows if len(row) == 11 and row[1] == "conserve"]
    assert [row[6].partition(",")[0] for row in figures] == ["1"]


def test_seeds_of_recorded_arrivals_are_said_to_be_no_other_arrivals() -> None:
    rows = made.as_recorded(made.rows(("conserve", "collocated"), (1.0,), 2))
    said = "Recorded arrivals are the same under every seed"
    html = render(rows, title="t", sections=("conditions",)).html
    assert said in html
    assert "12 are wanted" not in html  # more seeds would say no more
    one = made.as_recorded(made.rows(("conserve", "collocated"), (1.0,), 1))
    assert said not in render(one, title="t", sections=("conditions",)).html
    drawn = render(made.rows(seeds=2), title="t", sections=("conditions",)).html
    assert said not in drawn
    assert "12 are wanted" in drawn


def test_without_a_load_that_policies_meet_at_the_bars_say_so() -> None:
    row = made.row()
    row["cell"]["share_of_capacity"] = 0.5
    html = render([row], title="t", sections=("bars",)).html
    assert "No load of these rows is one that policies meet at" in html
    html = render([made.row()], title="t", sections=("bars",), rate_per_s=3.0).html
    assert "No row was run at 3 conversations/s." in html


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.5)])
def test_few_seeds_and_loads_are_said_and_do_not_fail(seeds: int, rates: tuple[float]) -> None:
    html = render(made.rows(rates=rates, seeds=seeds), title="t", capacities={}).html
    assert "12 are wanted" in html
    assert ("at fewer than two rates" in html) == (len(rates) == 1)
    assert ("No goodput without two rates" in html) == (len(rates) == 1)
    assert ("no interval excludes anything" in html) == (seeds == 1)


def test_rows_without_energy_slo_and_parts_say_so() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 2)
    for row in rows:
        for name in ("energy", "tokens_per_j", "tokens_per_j_low", "tokens_per_j_high", "where"):
            del row[name]
        row["slo"]["all"] = row["slo"]["ttfet"] = None
        row["latency"]["e2e_s_normalized"]["p95"] = None
    html = render(rows, title="t", capacities={}).html
    assert "Not in the rows: E2E, p95, Tokens per joule, Conversations within every SLO" in html
    assert "No row says where the time went" in html
    assert "power model" in html


def test_only_conserve_and_only_others_do_not_fail() -> None:
    for policy in ("conserve", "collocated"):
        html = render(made.rows((policy,), (1.0, 1.5), 2), title="t", capacities={}).html
        assert "Nothing can be compared" in html


def test_clusters_and_profiles_of_somebody_else_are_accepted() -> None:
    own = made.cluster("theirs", profile="tpu-v9")
    html = render(made.rows(("conserve", "collocated"), (1.0, 1.5), 2, on=own), title="t").html
    assert "not one of this package&#39;s" in html
    assert "What each part can carry could not be counted" in html


def test_failed_cells_are_counted_and_left_out() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0,), 2)
    lost = {key: made.row(seed=9)[key] for key in ("key", "cell")}
    lost["failure"] = {"error": "DeadlockError", "text": "p0 waits for d1"}
    html = render([*rows, lost], title="t", capacities={}).html
    assert "1 cell failed and are not in any figure: DeadlockError" in html
    with pytest.raises(LabError, match="of 1 rows none has any"):
        render([lost], title="t")


def test_rows_that_are_none_are_refused_by_number_and_field() -> None:
    row = made.row()
    del row["cell"]["contender"]["label"]
    with pytest.raises(LabError, match="row 2: its cell has no field 'label'"):
        render([made.row(), row], title="t")
    with pytest.raises(LabError, match="row 1: it has no field 'cell'"):
        render([{"key": "x"}], title="t")


def test_loads_of_a_search_are_points_of_no_curve_but_count_for_goodput() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 4)
    rows += [made.row(policy="conserve", rate_per_s=1.1 + s / 100, seed=s) for s in range(4)]
    html = render(rows, title="t", sections=("curves",)).html
    rates = {row[0] for row in Page(html).rows if len(row) > 6}
    assert rates == {"conversations/s", "1", "1.5"}


def test_a_study_of_fewer_seeds_beside_a_larger_one_is_shown() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 6)
    rows += made.rows(("round_robin",), (1.0, 1.5), 2)
    html = render(rows, title="t", sections=("curves",)).html
    assert {row[1] for row in Page(html).rows if row[0] == "1.5"} == {
        "conserve",
        "collocated",
        "round_robin",
    }


def test_rows_of_real_runs_have_all_that_a_report_shows() -> None:
    rows = []
    for label in ("conserve", "collocated"):
        for rate in (0.5, 1.0):
            for seed in range(2):
                workload = WorkloadSpec(
                    source="generated:swebench",
                    max_turns=2,
                    conversations=12,
                    rate_per_s=rate,
                    seed=seed,
                )
                cell = Cell(cluster=cluster("paper"), contender=contender(label), workload=workload)
                rows.append(json.loads(json.dumps(run_cell(cell))))
    html = render(rows, title="t").html
    for missing in ("Not in the rows", "No row says", "could not be counted", "No goodput"):
        assert missing not in html
    assert "What each part can carry" in html
    assert all(metric.of(row) is not None for metric in METRICS.values() for row in rows)


def test_shares_of_own_capacity_have_a_picture_of_their_own() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 2)
    for policy, capacity in (("conserve", 1.6), ("collocated", 1.7)):
        for share in (0.5, 0.9):
            for seed in range(2):
                row = made.row(policy=policy, rate_per_s=share * capacity, seed=seed)
                row["cell"]["share_of_capacity"] = share
                rows.append(row)
    html = render(rows, title="t", sections=("curves",)).html
    assert "each at a share of its own capacity" in html
    assert {"50 %", "90 %"} <= {row[0] for row in Page(html).rows}


# --- the summary and the command ------------------------------------------------------------------


def test_the_summary_has_the_same_tables_and_escapes_names() -> None:
    rows = made.rows(("conserve", "collocated"), (1.0, 1.5), 3)
    made_ = render(rows, title="t", summary=[EVIL], capacities={})
    assert "\\<script\\>" in made_.markdown
    assert "## Where it does not win" in made_.markdown
    tables = [line for line in made_.markdown.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    starts = [i for i, line in enumerate(tables) if line.startswith("|--")]
    for start in starts:
        assert widths[start] == widths[start - 1]
    assert "<svg" not in made_.markdown


def test_the_command_reads_files_of_rows_and_writes_both(tmp_path: Path) -> None:
    for name, policy in (("a", "conserve"), ("b", "collocated")):
        lines = [
            json.dumps(row | {"format": FORMAT}) for row in made.rows((policy,), (1.0, 1.5), 2)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    html, markdown = tmp_path / "r.html", tmp_path / "r.md"
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    options = ["--html", str(html), "--markdown", str(markdown), "--sections", "curves,losses"]
    result = CliRunner().invoke(report, [*files, *options])
    assert result.exit_code == 0, result.output
    assert "collocated" in html.read_text("utf-8")
    assert markdown.read_text("utf-8").startswith("# Policies compared")


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["{"], ["--html", "r.html"], "line 1"),
        ([""], ["--html", "r.html"], "there is no row"),
        (["{}"], [], "give --html FILE or --markdown FILE"),
        (["{}"], ["--html", "nowhere/r.html"], "its folder does not exist"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    result = CliRunner().invoke(report, ["rows.jsonl", *options])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_without_matplotlib_the_command_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from conserve_serving.cli import run; sys.exit(run(['report', 'rows.jsonl']))"
    )
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "'matplotlib' is not installed" in done.stderr
    assert "pip install 'conserve-agents[lab]'" in done.stderr


def test_every_section_has_an_id_of_the_list() -> None:
    html = render(every_kind_of_row(), title="t", capacities={}).html
    found = re.findall(r'<h2 id="(\w+)"', html)
    assert found == [name for name in SECTIONS if name != "claims"]
