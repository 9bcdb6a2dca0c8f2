"""``trivium demo``: the whole of this version on one screen: plan, one hash, learning, experts, the engine, report.

ZeRO sections 5 and 7, DeepSpeed-MoE section 4, DeepSpeed Inference section 3.1, on this machine's cores, in minutes;
everything it shows is computed while one watches.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trivium.base.errors import ConfigError, TriviumError
from trivium.base.units import format_bytes, format_count
from trivium.cli import demo_ask, demo_experts, demo_runs, launching
from trivium.cli.interrupts import ended, handed_on
from trivium.cli.output import data_console, fitted

KILLED_AT, SAVED_EVERY = 16, 8
ASK = 5
INTERRUPTED = 130
REQUIRED_SHARE = 0.95
REQUIRED_RATIO = 0.7


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("demo", help="See it all work on this machine: plan, same hashes, learning, experts, answers.")(demo)


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo writes; emptied first.")] = Path("runs/demo"),
    text: Annotated[bool, typer.Option("--text", help="Train the half-hour text model instead.")] = False,
    part: Annotated[
        int | None, typer.Option("--part", min=1, max=5, help="Only this one of the five; 5 asks what part 4 left.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also write the screen as a picture.")] = None,
    launched: Annotated[Path | None, typer.Option("--launched", hidden=True)] = None,
    terminal: Annotated[bool, typer.Option("--terminal", hidden=True)] = False,
) -> None:
    """Runs on two ranks, on the CPU, in minutes on two cores; exits 1 if a promise is not kept."""
    if launched is not None:
        code, _ = launching.as_rank(launched, lambda: _rank(folder))
        raise typer.Exit(code)
    if text:
        raise typer.Exit(_half_hour())
    if part == ASK:
        demo_ask.newest(demo_runs.teacher(folder))
    else:
        _empty(folder)
    console = data_console()
    console.record = svg is not None
    shown = _Demo(folder, console)
    parts = ((shown.plan,), (shown.same, shown.killed), (shown.learn,), (shown.answer,), (shown.ask,))
    for one in parts if part is None else parts[part - 1 : part]:
        for show in one:
            show()
    shown.end()
    if svg is not None:
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(console.export_svg(title="trivium demo"), encoding="utf-8")
    if shown.broken:
        raise TriviumError("; ".join(shown.broken))


class _Demo:
    """The parts in their order; ``broken`` collects the promises that were not kept."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.broken: list[str] = []
        self._hash = ""
        self._begun = time.monotonic()
        self._reports: list[str] = []
        self._asked = False
        self._files = {name: self._write(name) for name in ("same", "text", "tasks", "student", "dense")}

    def plan(self) -> None:
        """What the text model would take at every stage, before anything runs."""
        from trivium.base import config as configs
        from trivium.plan.configured import decoder_of, setting_of
        from trivium.plan.forecast import forecast, inventory_of
        from trivium.train.config import TrainConfig

        config = configs.load(TrainConfig, self._files["text"])
        decoder = decoder_of(config)
        setting = setting_of(config, demo_runs.RANKS)
        inventory = inventory_of(decoder)
        count = decoder.num_parameters()
        self._head("1", f"Plan: Ψ = {format_count(count)} parameters, {demo_runs.RANKS} ranks, fp32, nothing run yet")
        rows = []
        for stage in range(4):
            plan = forecast(inventory, setting.at_stage(stage), decoder)
            memory, sent = plan.memory, plan.communication.per_step.sent_bytes
            held = (_mib(getattr(memory, name)) for name in ("parameters", "gradients", "optimizer"))
            told = f"{memory.states / count:.2f}", _mib(sent), f"{_volume(sent, count):.2f}"
            rows.append((str(stage), *held, *told))
        header = ("stage", "weights", "gradients", "optimizer", "bytes/Ψ", "sent/step", "÷Ψ(N-1)/N")
        self.console.print(fitted(header, rows, self.console.width))

    def same(self) -> None:
        """Stages 0 to 3 and one process: five lines with one hash."""
        config = json.loads(self._files["same"].read_text())
        self._head(
            "2",
            f"The same hash: {config['train']['steps']} steps at every stage, and with plain torch",
        )
        rows_path = self.folder / "same.jsonl"
        rows: list[dict[str, Any]] = []
        count = self._same_count()

        def show(row: dict[str, Any]) -> None:
            rows.append(row)
            sent, paper = _volume(row["sent_bytes"], count), 3 if row["name"] == "stage 3" else 2
            told = f"sent {sent:.2f} of {paper} Ψ" if sent else ""
            self.console.print(f"  {row['name']:<12}{row['sha256'][:40]}…  {told:<16}{row['seconds']:4.1f}s")

        with _followed(rows_path, show):
            code, _ = launching.launch("demo", ["--folder", str(self.folder)], demo_runs.RANKS)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise TriviumError(f"the runs of part 2 failed with exit code {code}")
        hashes = {row["sha256"] for row in rows}
        self._hash = rows[0]["sha256"]
        self._promise(len(rows) == 5 and len(hashes) == 1, f"{len(rows)} runs, {len(hashes)} SHA-256")

    def killed(self) -> None:
        """The same run killed while it saves, and resumed on another number of ranks."""
        sets = ("--set", f"checkpoint.every={SAVED_EVERY}", "--set", f"run={json.dumps(str(self.folder / 'killed'))}")
        fault = f"checkpoint.shard:1:{KILLED_AT}:kill9"
        killed = self._train("same", demo_runs.RANKS, *sets, environment={"TRIVIUM_FAULT": fault}, quiet=True)
        by_signal = killed.returncode != 0 and f"signal {signal.SIGKILL.value}" in killed.stderr
        self._promise(by_signal, f"rank 1 of {demo_runs.RANKS} killed (SIGKILL) while saving step {KILLED_AT}")
        answer = _answer(self._train("same", 1, *sets, "--resume", "must", quiet=True))
        metrics = (self.folder / "killed" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        starts = [row["step"] for row in map(json.loads, metrics) if row["kind"] == "start"]
        self.console.print(f"  resumed on 1 rank from step {starts[-1]}: {answer['sha256'][:40]}…")
        kept = starts[-1] == KILLED_AT - SAVED_EVERY and answer["sha256"] == self._hash
        self._promise(kept, "resumed on another number of ranks: the same hash")

    def learn(self) -> None:
        """A small language model at stage 3 on real text, against counting alone; plan beside measured."""
        self._head("3", "Learning: a language model on Python's own source, stage 3, 2 ranks")
        answer = _answer(self._train("text", demo_runs.RANKS))
        ratio = answer["validation"] / answer["unigram"]
        self.console.print(
            f"  validation {answer['validation']:.3f} nats = {ratio:.2f} × unigram {answer['unigram']:.3f} "
            f"(bigram {answer['bigram']:.3f}); {answer['tokens_per_s']:,.0f} tokens/s"
        )
        for prompt, written in answer["samples"]:
            self.console.print(f"  {prompt!r} → {written!r}")
        self._promise(ratio < REQUIRED_RATIO, f"validation loss below {REQUIRED_RATIO} × the unigram baseline")
        rows = []
        for name, row in answer["planned"].items():
            off = row["measured"] / max(row["planned"], 1) - 1
            told = "exact" if row["planned"] == row["measured"] else f"{off:+.1%}"
            rows.append((name, format_bytes(row["planned"]), format_bytes(row["measured"]), told))
        self.console.print(fitted(("rank 0", "plan", "measured", ""), rows, self.console.width))
        self._reports.append(answer["report"])

    def answer(self) -> None:
        """Experts on both ranks answer inputs that they have never seen; a student of theirs, and a dense model."""
        self._head("4", "Experts on 2 ranks, stage 3: generated tasks, held-out inputs; then their student")
        found = demo_experts.show(self.console, lambda *args, **options: _answer(self._train(*args, **options)))
        worst = min(found["tasks"]["scores"].values())
        self._promise(worst >= REQUIRED_SHARE, f"every task at {REQUIRED_SHARE:.0%} or more")
        self._reports += [answer["report"] for answer in found.values()]

    def ask(self) -> None:
        """The teacher's checkpoint answers through the engine, alone and in a batch."""
        self._head(str(ASK), "The teacher's checkpoint, answering through tv.inference.LLM")
        demo_ask.show(self.console, demo_runs.teacher(self.folder), self._promise)
        self._asked = True

    def end(self) -> None:
        """Where the pictures are, and what to type next: last of all how to talk to the model."""
        pictures = " Pictures, offline:" if self._reports else ""
        self._head("6", f"Done in {time.monotonic() - self._begun:.0f} s.{pictures}")
        for report in self._reports:
            self.console.print(f"  {report}", soft_wrap=True)
        program = Path(sys.executable).with_name("trivium")
        shown = os.path.relpath(program) if program.is_file() else "trivium"
        self.console.print(f"  next: {shown} train configs/stdlib.toml --ranks 2", soft_wrap=True)
        self.console.print("        your own text: --set 'data.paths=[\"folder\"]'")
        if self._asked:
            self.console.print(f"  talk to the model; {demo_ask.PROMPT!r} is what it has learned to answer:")
            for line in demo_ask.commands(shown, demo_runs.teacher(self.folder)):
                self.console.print(f"        {line}", soft_wrap=True)

    def _same_count(self) -> int:
        from trivium.base import config as configs
        from trivium.train.config import TrainConfig

        config = configs.load(TrainConfig, self._files["same"])
        return config.model.decoder(config.data.vocabulary).num_parameters()

    def _write(self, name: str) -> Path:
        values: Mapping[str, Any] = getattr(demo_runs, name)(self.folder)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
        return path

    def _train(
        self,
        name: str,
        ranks: int,
        *options: str,
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
        verb: str = "train",
    ) -> subprocess.CompletedProcess[str]:
        """``trivium train`` or ``distill`` as one would type it."""
        command = [sys.executable, "-m", "trivium", verb, str(self._files[name]), "--ranks", str(ranks), "--json"]
        return _call([*command, *options], environment, subprocess.PIPE, subprocess.PIPE if quiet else None)

    def _head(self, number: str, words: str) -> None:
        self.console.print()
        self.console.print(f"{number}. {words}", style="bold")

    def _promise(self, kept: bool, words: str) -> None:
        self.console.print(f"  {'✓' if kept else '✗'} {words}", style="green" if kept else "red")
        if not kept:
            self.broken.append(f"not kept: {words}")


def _rank(folder: Path) -> tuple[int, Any]:
    """This process's share of part 2."""
    import torch

    from trivium.base import log
    from trivium.cli import demo_same
    from trivium.dist.launch import init

    torch.set_num_threads(1)
    mesh = init(device="cpu")
    log.get().setLevel("WARNING")
    stopped = demo_same.run(folder / "same.json", folder / "same.jsonl", mesh)
    return (128 + stopped if stopped else 0), None


def _half_hour() -> int:
    """The text model that completes Python code."""
    command = [sys.executable, "-m", "trivium", "train", "configs/stdlib.toml", "--ranks", str(demo_runs.RANKS)]
    if not Path("configs/stdlib.toml").is_file():
        raise ConfigError("configs/stdlib.toml is not here: run `make demo-text` in the project's folder")
    return _call(command).returncode


def _call(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end. Ctrl-C is handed on and its own way of stopping waited for, then it ends this too."""
    env = {**os.environ, **(environment or {})}
    with (
        handed_on(signal.SIGINT) as hand,
        subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, text=True) as process,
    ):
        hand.to(process.send_signal)
        out, err = ended(process)
    if hand.first or process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _empty(folder: Path) -> None:
    """Make ``folder`` anew; refuses one that holds anything but an earlier demo."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "same.json").is_file():
        raise ConfigError(f"{folder} is not empty and holds no earlier demo: name another folder with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _answer(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a run printed as JSON; its own words when it failed."""
    if process.returncode:
        raise TriviumError(
            f"a run failed with exit code {process.returncode}: {(process.stderr or '').strip()[-2000:]}"
        )
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


def _volume(sent_bytes: int, count: int) -> float:
    """Bytes as multiples of what one pass over Ψ fp32 elements sends: Ψ(N-1)/N."""
    return sent_bytes / (4 * count * (demo_runs.RANKS - 1) / demo_runs.RANKS)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


@contextmanager
def _followed(path: Path, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Hand each row that appears in the JSON-lines file at ``path`` to ``show``, while the block runs."""
    done = threading.Event()
    seen = 0

    def look() -> None:
        nonlocal seen
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        for line in lines[seen:]:
            if line.endswith("\n"):
                show(json.loads(line))
                seen += 1

    def follow() -> None:
        while not done.wait(0.2):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()
