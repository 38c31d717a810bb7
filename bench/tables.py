"""The Markdown tables and the plots of samples.json, which bench/run.py wrote."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OURS, PLAIN, PEER, INK = "#0b6e8a", "#c8743c", "#7a7f87", "#22262b"
COLOURS = {"ours": OURS, "ours-4": "#6fb1c4", "plain": PLAIN, "plain-our-rate": "#e2b08c"}
MARKS = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
Samples = dict[str, Any]
Figure = Callable[[dict[str, Any]], float]


def good(samples: Samples, key: str) -> list[dict[str, Any]]:
    """The results of a trial that did not fail."""
    return [result for result in samples["results"].get(key, []) if "failed" not in result]


def values(samples: Samples, key: str, figure: Figure) -> list[float]:
    """One number of each result."""
    return [figure(result) for result in good(samples, key)]


def steady_epochs(samples: Samples, key: str, figure: Figure = lambda result: 1.0) -> list[float]:
    """Seconds of all epochs but the first of a process, which holds the compilation; times `figure` of its result."""
    return [seconds * figure(result) for result in good(samples, key) for seconds in result["epochs"][1:]]


def a_second(samples: Samples, key: str) -> list[float]:
    """Images a second of each steady epoch."""
    return [1 / seconds for seconds in steady_epochs(samples, key, lambda result: 1 / result["images_an_epoch"])]


def spread(found: Sequence[float], form: str = "{:.1f}") -> str:
    """Median (least .. most)."""
    if not found:
        return "-"
    middle = form.format(statistics.median(found))
    if len(found) == 1:
        return middle
    return f"{middle} ({form.format(min(found))} .. {form.format(max(found))})"


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float] | None:
    """Their median over ours, and the least and the most that any two of the samples give."""
    if not theirs or not ours:
        return None
    return (
        statistics.median(theirs) / statistics.median(ours),
        min(theirs) / max(ours),
        max(theirs) / min(ours),
    )


def told_ratio(found: tuple[float, float, float] | None) -> str:
    """As a cell of a table."""
    if found is None:
        return "-"
    form = "{:.2f}" if found[0] < 10 else "{:.1f}" if found[0] < 1000 else "{:.0f}"
    middle, low, high = (form.format(one) for one in found)
    return f"**{middle}** ({low} .. {high})"


def lines_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def comparisons(samples: Samples) -> list[tuple[str, str, float | None, list[float], list[float]]]:
    """(what is compared, with whom, the ratio that is aimed at, their seconds, ours)."""

    def head(key: str) -> list[float]:
        return values(samples, f"head/{key}", lambda result: result["seconds"])

    def epoch(key: str) -> list[float]:
        return steady_epochs(samples, f"step/{key}")

    def unwaiting(result: dict[str, Any]) -> float:
        # At the beginning of an epoch Keras' generator now and then waits for seconds, while no processor works.
        first, *steady = result["epochs"]
        return float(first + len(steady) * min(steady))

    def first(key: str) -> list[float]:
        return values(samples, f"step/{key}", lambda result: result["epochs"][0])

    def start(key: str) -> list[float]:
        return values(samples, f"step/{key}", lambda result: result["start_to_first_step"])

    def call(key: str) -> list[float]:
        return values(samples, f"step/{key}", lambda result: result["call_to_first_step"])

    rows: list[tuple[str, str, float | None, list[float], list[float]]] = [
        ("10 head epochs, one cached view", "plain, frozen", 8, head("plain"), head("ours")),
        ("10 head epochs, one cached view", "plain, frozen, all epochs as quick as its quickest", None,
         values(samples, "head/plain", unwaiting), head("ours")),
        ("10 head epochs, four cached views", "plain, frozen", None, head("plain"), head("ours-4")),
    ]  # fmt: skip
    rivals = {
        "plain": "plain, Adam", "plain-frozen": "plain, Adam, BatchNorm frozen", "plain-sgd": "plain, SGD",
        "plain-bn": "plain, BatchNorm learns", "plain-xla": "plain, Adam, XLA",
    }  # fmt: skip
    aimed = {"plain", "plain-xla"}
    for what, aim, figure in (
        ("fine-tuning epoch, steady", 1.5, epoch),
        ("first epoch, with compilation", None, first),
        ("process start to first step", 4, start),
        ("call to first step", None, call),
    ):
        for key, told in rivals.items():
            rows.append((what, told, aim if key in aimed else None, figure(key), figure("ours")))
    return [row for row in rows if row[3] and row[4]]


def table_of(samples: Samples) -> str:
    """All tables, as they stand in docs/performance.md."""
    parts = [machine(samples), *ratios(samples), *race(samples), *inputs(samples), *levers(samples), *torch(samples)]
    return "\n".join([*parts, *failures(samples)]) + "\n"


def machine(samples: Samples) -> str:
    """What was measured where."""
    facts, options = samples["machine"], samples["options"]
    libraries = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    loads = [result["load_before"] for results in samples["results"].values() for result in results]
    busy = f"load before the measurements {min(loads):.1f} .. {max(loads):.1f}" if loads else ""
    return (
        f"{facts['date']}, {facts['cores']} cores of {facts['cpu']}, {facts['memory_gib']} GiB, Python "
        f"{facts['python']}, {libraries}, commit {facts['commit']}; {options['size_px']} px, batches of "
        f"{options['batch_size']}, images of {Path(options['dataset']).name}; {busy}. Median (least .. most).\n"
    )


def ratios(samples: Samples) -> list[str]:
    """Our seconds, theirs, and how many times faster."""
    rows = [
        [what, whom, spread(ours), spread(theirs), told_ratio(ratio(theirs, ours)), f"{aim:g}" if aim else ""]
        for what, whom, aim, theirs, ours in comparisons(samples)
    ]
    if not rows:
        return []
    memory = [
        f"{samples['trials'][key]['told']} {spread(values(samples, key, lambda result: result['peak_mib']), '{:.0f}')}"
        for key in ("step/ours", "step/plain", "step/plain-frozen")
        if good(samples, key)
    ]
    return [
        *lines_of(["what", "beside", "ours, s", "theirs, s", "times faster", "aim"], rows),
        "",
        f"Peak resident memory, MiB: {'; '.join(memory)}." if memory else "",
        "",
    ]


def reached(result: dict[str, Any], target: float) -> float | None:
    """Seconds to the end of the first epoch with that accuracy."""
    return next((seconds for seconds, accuracy in result["curve"] if accuracy >= target), None)


def best(result: dict[str, Any]) -> float:
    """The best validation accuracy of a curve."""
    return max((accuracy for _, accuracy in result["curve"]), default=0.0)


def target_of(samples: Samples) -> float | None:
    """--target, or the best accuracy of plain Keras by the reference's recipe, the least of its seeds."""
    if samples["options"]["target"] != "None":
        return float(samples["options"]["target"])
    return min((best(result) for result in good(samples, "accuracy/plain")), default=None)


def race(samples: Samples) -> list[str]:
    """Seconds to the target accuracy and to some others; what was not reached is a lower bound."""
    ours = {result["seed"]: result for result in good(samples, "accuracy/ours")}
    target = target_of(samples)
    if not ours or target is None:
        return []
    marks = [mark for mark in MARKS if any(best(result) >= mark for result in ours.values())]
    rows = []
    for key in ("ours", "plain", "plain-our-rate"):
        for result in good(samples, f"accuracy/{key}"):
            seconds, own = reached(result, target), reached(ours.get(result["seed"], {"curve": []}), target)
            last = result["curve"][-1][0] if result["curve"] else 0.0
            times = ""
            if own and key != "ours":
                times = f"**{seconds / own:.1f}**" if seconds else f"**> {last / own:.1f}**"
            cells = [_seconds(reached(result, mark)) for mark in marks]
            told = samples["trials"][f"accuracy/{key}"]["told"]
            rows.append([told, str(result["seed"]), *cells, f"{best(result):.3f}", _seconds(seconds), times])
    options = samples["options"]
    spec = samples["trials"]["accuracy/ours"]["spec"]
    n_train = spec.get("n_train") or options["train_images"]
    n_val = spec.get("n_val") or options["val_images"]
    head = ["recipe", "seed", *(f"s to {mark:.0%}" for mark in marks), "best", f"s to {target:.1%}", "times ours"]
    return [
        *lines_of(head, rows),
        "",
        f"{n_train} images to train by, {n_val} to validate by; each recipe has {float(options['budget']):.0f} s. "
        "From the start of the process to the end of the first epoch with that accuracy, compilation and all.",
        "",
    ]


def _seconds(found: float | None) -> str:
    return "-" if found is None else f"{found:.0f}"


def inputs(samples: Samples) -> list[str]:
    """Images a second of the input alone, and of the step that it feeds."""
    ours = good(samples, "input/ours")
    if not ours:
        return []

    def step(key: str) -> list[float]:
        return a_second(samples, f"step/{key}")

    feeding = values(samples, "input/ours", lambda result: result["images_a_second"])
    varied = values(samples, "input/ours", lambda result: result["augmented_images_a_second"])
    plain = values(samples, "input/plain", lambda result: result["images_a_second"])
    whole = "{:.0f}"
    rows = [
        ["ours: batches", spread(feeding, whole), spread(step("ours"), whole),
         told_ratio(ratio(feeding, step("ours")))],
        ["ours: batches and augmentation", spread(varied, whole), spread(step("ours"), whole),
         told_ratio(ratio(varied, step("ours")))],
        ["plain: ImageDataGenerator", spread(plain, whole), spread(step("plain"), whole),
         told_ratio(ratio(plain, step("plain")))],
    ]  # fmt: skip
    return [*lines_of(["input", "images/s alone", "images/s of its step", "times faster"], rows), ""]


def milliseconds_an_image(samples: Samples, key: str) -> list[float]:
    """Of each steady epoch."""
    return steady_epochs(samples, key, lambda result: 1000 / result["images_an_epoch"])


def levers(samples: Samples) -> list[str]:
    """What each lever costs to compile, what it saves a step, and from how many images on it pays."""
    base = good(samples, "levers/base")
    if not base:
        return []

    def an_image(key: str) -> list[float]:
        return milliseconds_an_image(samples, key)

    def call(key: str) -> list[float]:
        return values(samples, key, lambda result: result["call_to_first_step"])

    usual, usual_call = (statistics.median(of("levers/base")) for of in (an_image, call))
    rows = []
    for key, trial in samples["trials"].items():
        if trial["group"] != "levers" or not good(samples, key):
            continue
        ms, compiling = statistics.median(an_image(key)), statistics.median(call(key))
        saved, cost = usual - ms, compiling - usual_call
        pays = "" if key == "levers/base" else "no" if saved <= 0.02 * usual else "yes"
        if pays == "yes" and cost > 0:
            pays = f"after {1000 * cost / saved:,.0f} images"
        peak = spread(values(samples, key, lambda result: result["peak_mib"]), "{:.0f}")
        rows.append([trial["told"], spread(call(key)), spread(an_image(key)), f"{usual / ms:.2f}", peak, pays])
    head = ["lever, alone", "first step, s", "ms an image", "times faster", "peak MiB", "pays"]
    return [*lines_of(head, rows), "", "A difference below 2 % is none.", ""]


def torch(samples: Samples) -> list[str]:
    """PyTorch's DenseNet201 beside ours, the same batch, size and optimiser."""
    ours = good(samples, "torch/ours")
    if not ours:
        return []
    batch = int(samples["options"]["batch_size"])
    own = steady_epochs(samples, "torch/ours", lambda result: batch / result["images_an_epoch"])
    rows = [["this project", spread(own, "{:.2f}"), spread([result["call_to_first_step"] for result in ours]), ""]]
    for key, trial in samples["trials"].items():
        found = good(samples, key)
        if trial["group"] == "torch" and key != "torch/ours" and found:
            told = f"{trial['told']}, torch {found[0]['version']}"
            # The first steps warm up.
            theirs = [seconds for result in found for seconds in result["steps"][2:]]
            first = [result["call_to_first_step"] for result in found]
            rows.append([told, spread(theirs, "{:.2f}"), spread(first), told_ratio(ratio(theirs, own))])
    return [
        *lines_of(["DenseNet201, AdamW", "s a step", "first step, s", "their step / ours"], rows),
        "",
        "32 bits, BatchNorm at rest in all, scale and shift too; ours: epochs, theirs: steps. PyTorch's images are "
        "random numbers, so its step has no input and no augmentation, which ours has.",
        "",
    ]


def failures(samples: Samples) -> list[str]:
    """What did not run, and why."""
    return [
        f"Failed: {key}: {result['failed']}"
        for key, results in samples["results"].items()
        for result in results
        if "failed" in result
    ]


def draw(samples: Samples, output: Path) -> None:
    """ratios.png, accuracy.png and levers.png, as far as there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a6",
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "figure.dpi": 150,
    }  # fmt: skip
    _draw_ratios(plt, samples, output / "ratios.png")
    _draw_race(plt, samples, output / "accuracy.png")
    _draw_levers(plt, samples, output / "levers.png")


def _draw_ratios(plt: Any, samples: Samples, file: Path) -> None:
    rows = comparisons(samples)
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.42 * len(rows)), layout="constrained")
    for place, (_, _, aim, theirs, ours) in enumerate(reversed(rows)):
        found = ratio(theirs, ours)
        assert found is not None
        middle, low, high = found
        axes.barh(place, middle, height=0.62, color=OURS if aim else "#9cc7d3")
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
        if aim:
            axes.plot([aim, aim], [place - 0.4, place + 0.4], color=PLAIN, linewidth=2.2)
        axes.annotate(f"{middle:.1f}", (high, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [f"{what}\n{whom}" for what, whom, *_ in reversed(rows)], fontsize=8)
    axes.axvline(1, color="#9aa0a6", linewidth=0.8)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("times faster than plain Keras; line: least and most, orange: the aim")
    figure.savefig(file)
    plt.close(figure)


def _draw_race(plt: Any, samples: Samples, file: Path) -> None:
    keys = [key for key in samples["trials"] if key.startswith("accuracy/") and good(samples, key)]
    if not keys:
        return
    target = target_of(samples)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for key in keys:
        name = key.partition("/")[2]
        for number, result in enumerate(good(samples, key)):
            if not result["curve"]:
                continue
            seconds, accuracies = zip(*result["curve"], strict=True)
            label = samples["trials"][key]["told"] if number == 0 else None
            axes.plot(seconds, accuracies, color=COLOURS[name], linewidth=1.8, marker=".", markersize=5, label=label)
            first = reached(result, target) if target is not None else None
            if first is not None:
                axes.plot(first, accuracies[seconds.index(first)], marker="o", markersize=8, color=COLOURS[name])
    if target is not None:
        axes.axhline(target, color="#9aa0a6", linewidth=0.8, linestyle="--")
        axes.annotate(f"plain Keras' best, {target:.1%}" if samples["options"]["target"] == "None" else
                      f"target {target:.1%}", (0, target), (4, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the start of the process")
    axes.set_ylabel("validation accuracy")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8)
    figure.savefig(file)
    plt.close(figure)


def _draw_levers(plt: Any, samples: Samples, file: Path) -> None:
    keys = [key for key in samples["trials"] if key.startswith("levers/") and good(samples, key)]
    if not keys:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.8 + 0.34 * len(keys)), sharey=True, layout="constrained")
    for place, key in enumerate(reversed(keys)):
        colour = OURS if key == "levers/base" else "#9cc7d3"
        ms = milliseconds_an_image(samples, key)
        first = values(samples, key, lambda result: result["call_to_first_step"])
        for axes, found in ((left, ms), (right, first)):
            axes.barh(place, statistics.median(found), height=0.62, color=colour)
            axes.plot([min(found), max(found)], [place, place], color=INK, linewidth=1.2)
    left.set_yticks(range(len(keys)), [samples["trials"][key]["told"] for key in reversed(keys)], fontsize=8)
    left.set_xlabel("ms an image")
    right.set_xlabel("s to the first step")
    figure.savefig(file)
    plt.close(figure)
