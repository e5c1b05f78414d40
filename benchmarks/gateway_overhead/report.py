"""Results as a Markdown page."""

from __future__ import annotations

from typing import Any


def _size(history_bytes: int) -> str:
    if history_bytes >= 1_000_000:
        return f"{history_bytes / 1e6:g} MB"
    return f"{history_bytes / 1e3:g} kB"


def _names(row: dict[str, Any]) -> list[str]:
    return [name for name in ("direct", "conserve", "smg") if name in row]


def grid_line(row: dict[str, Any]) -> str:
    """One row, for people who watch."""
    rates = ", ".join(
        f"{name} {row[name]['requests_per_s']:,.0f}/s p50 {row[name]['p50_ms']:.2f} ms "
        f"{row[name]['cpu_us_per_request']:.0f} µs"
        for name in _names(row)
    )
    return f"{_size(row['history_bytes']):>7} × {row['clients']:2}: {rates}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    c = results["conditions"]
    lines = [
        "# Gateway overhead",
        "",
        f"{c['date']}, commit {c['commit']}, {c['cores']} × {c['cpu']}, Python {c['python']}, "
        f"uvloop {c['uvloop']}; smg {c['smg']}. The measured process has one core to itself; load "
        f"and dummy engines share the other. Load average before {c['load_average_before']}, after "
        f"{c.get('load_average_after')}. Medians over interleaved rounds; conversations of "
        f"{c['turns_per_conversation']} turns, named by a header; 5 events a reply."
        + (" **Short run: a smoke test, not a measurement.**" if c["short"] else ""),
        "",
    ]
    if "grid" in results:
        rows = []
        for row in results["grid"]:
            direct = row["direct"]
            for name in _names(row):
                cell = row[name]
                ratio = row.get("smg", {}).get("requests_per_s")
                rows.append(
                    [
                        _size(row["history_bytes"]),
                        str(row["clients"]),
                        name,
                        f"{cell['requests_per_s']:,.0f}",
                        f"{cell['requests_per_s'] / ratio:.2f}" if ratio else "",
                        f"{cell['p50_ms'] - direct['p50_ms']:.2f}" if name != "direct" else "",
                        f"{cell['p99_ms'] - direct['p99_ms']:.2f}" if name != "direct" else "",
                        f"{cell['cpu_us_per_request']:.0f}" if name != "direct" else "",
                        f"{cell['cpu_share']:.0%}" if name != "direct" else "",
                    ]
                )
        header = [
            "history", "clients", "through", "req/s", "× smg", "added p50 ms", "added p99 ms",
            "CPU µs/request", "of its core",
        ]  # fmt: skip
        lines += [*_table(header, rows), ""]
    lines += _small(results)
    return "\n".join(lines)


def _small(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    titles = {
        "event_cost": "CPU per event: growth of a request's CPU with events 2 ms apart, 16 streams",
        "beside_large_bodies": "Delay of events (sent to received): 16 streams with an event each "
        "5 ms, alone and beside one client that posts 2 MB histories",
        "aborts": "From the client's leaving to the engine's hearing of it",
        "memory": "Resident memory per open stream",
    }
    for part, title in titles.items():
        if part not in results:
            continue
        cells = results[part]
        names = _names(cells)
        keys = list(cells[names[0]])
        rows = [[name, *(f"{cells[name][key]:.2f}" for key in keys)] for name in names]
        lines += [f"**{title}**", "", *_table(["through", *keys], rows), ""]
    return lines
