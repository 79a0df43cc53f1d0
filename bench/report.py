"""`python -m bench.report results.json [--out folder]`: a run's figures as a markdown table and plots.

The JSON is pytest-benchmark's (`pytest bench --benchmark-json=results.json`). The folder gets report.md, ratios.png
(rival time / our time, a bar a rival) and one recall-against-speed plot for each case that drew a curve.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def case_name(case):
    """bench/test_scan.py::test_topk[ip] -> scan: topk[ip]."""
    path, _, test = case["fullname"].partition("::")
    return f"{pathlib.PurePath(path).stem.removeprefix('test_')}: {test.removeprefix('test_')}"


def slug(name):
    """A file name for a case."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def rate(info, key, ceiling):
    """One rate with its part of the ceiling, or nothing where a case has none."""
    return f"{info[key]:.1f} ({info[ceiling]:.0%})" if key in info else ""


def machine_line(results):
    """What ran where: no figure means anything without it."""
    machine, commit = results["machine_info"], results["commit_info"]
    info = machine["polyvec"]
    return (
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {info['cpus']} CPUs, {info['machine']}, "
        f"isa {info['isa']}, {info['num_threads']} thread(s), Python {info['python']}, numpy {info['numpy']}, "
        f"polyvec {info['version']} at {commit['id'][:12]}{' with changes' if commit['dirty'] else ''}"
    )


def table(cases):
    """One row a case: our time and rates, and every rival's time over ours."""
    lines = [
        "| case | ms | GFLOP/s (of sgemm) | GB/s (of copy) | rival time / our time |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for case in cases:
        info = case["extra_info"]
        against = ", ".join(f"{rival} {ratio:.2f}" for rival, ratio in info["ratios"].items())
        lines.append(
            f"| {case_name(case)} | {info['seconds']['polyvec']['median'] * 1e3:.3f} "
            f"| {rate(info, 'gflops', 'of_sgemm')} | {rate(info, 'gbs', 'of_copy')} | {against} |"
        )
    return lines


def curve_table(case):
    """One row a setting of each contender."""
    lines = [f"### {case_name(case)}", "", "| | setting | recall | queries/s |", "| --- | ---: | ---: | ---: |"]
    for name, points in case["extra_info"]["curve"].items():
        lines += [f"| {name} | {p['setting']} | {p['recall']:.4f} | {p['qps']:,.0f} |" for p in points]
    return lines


def plot_ratios(cases, path):
    """Bars to the right of 1 are rivals that are slower than we are."""
    bars = [
        (f"{case_name(case)}, {rival}", ratio)
        for case in cases
        for rival, ratio in case["extra_info"]["ratios"].items()
    ][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * len(bars)), layout="constrained")
    container = axes.barh([label for label, _ in bars], [ratio for _, ratio in bars])
    axes.bar_label(container, fmt="%.2f", padding=2, fontsize="small")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="rival time / our time (right of 1: we are faster)")
    axes.tick_params(labelsize="small")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curve(case, path):
    """Up and to the right is better."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, points in case["extra_info"]["curve"].items():
        axes.plot([p["recall"] for p in points], [p["qps"] for p in points], marker="o", label=name)
        for p in points:
            axes.annotate(p["setting"], (p["recall"], p["qps"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(yscale="log", xlabel="recall", ylabel="queries per second", title=case_name(case))
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(results, folder):
    """Write report.md and its plots; returns the markdown."""
    compared = [case for case in results["benchmarks"] if "ratios" in case["extra_info"]]
    curves = [case for case in results["benchmarks"] if "curve" in case["extra_info"]]
    lines = ["# Bench", "", machine_line(results), ""]
    if compared:
        ceilings = compared[0]["extra_info"]["ceilings"]
        lines += [
            f"Ceilings measured in the same run: sgemm {ceilings['sgemm']:.1f} GFLOP/s, "
            f"reading {ceilings['read']:.1f} GB/s, copying {ceilings['copy']:.1f} GB/s (read and write).",
            "",
            *table(compared),
            "",
            "![Ratios](ratios.png)",
            "",
        ]
        plot_ratios([case for case in compared if case["extra_info"]["ratios"]], folder / "ratios.png")
    for case in curves:
        picture = f"{slug(case_name(case))}.png"
        lines += [*curve_table(case), "", f"![{case_name(case)}]({picture})", ""]
        plot_curve(case, folder / picture)
    text = "\n".join(lines)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="JSON of pytest --benchmark-json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-report"), help="folder to write")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(write_report(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.out))


if __name__ == "__main__":
    main()
