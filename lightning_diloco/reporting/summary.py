"""The lines that a fit says about itself on process 0, at its start and at its end.

Owns the words and the estimates. Numbers come from where they are kept: the engine, the ledger, the times. Does not
decide whether anything is said (``fit.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Mapping
from time import perf_counter

import torch

from lightning_diloco.algorithms.diloco import Diloco
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.engine.engine import Engine
from lightning_diloco.reporting.cores import usable_cores
from lightning_diloco.reporting.plan import Plan
from lightning_diloco.state.outer import OuterFactory, trial_optimizer

_WEIGHTS = {
    "average": "the mean of the workers' weights",
    "outer": "the outer model θ of the last synchronisation",
    "worker": "worker 0's weights",
}


class Summary:
    """The lines of a fit.

    Args:
        engine: of the fit.
        plan: what is known in advance.
        outer_factory: of the outer optimizer, to tell how much state it will have.
        say: prints a line on process 0.
    """

    def __init__(self, engine: Engine, plan: Plan, outer_factory: OuterFactory, say: Callable[[str], None]) -> None:
        self._engine, self._plan, self._say = engine, plan, say
        self._outer_state = outer_state(outer_factory)
        self._sent_before = engine.context.ledger.total_bytes
        self._stepped = self._ended = False
        self._begun = perf_counter()
        self._per_round = self._known_bytes()
        self._says_bytes = engine.num_workers > 1 and not engine.algorithm.chooses_workers
        for line in (self._who(), self._how_long(), self._which_weights(), self._further_processes()):
            if line:
                self._say(line)

    def after_step(self) -> None:
        """After every local step, and once more after the last synchronisation."""
        if not self._stepped and self._engine.local_steps > self._plan.done:
            self._stepped = True  # by now the inner optimizers have their state
            self._say(self._how_large())
        ledger = self._engine.context.ledger
        whole_round = self._engine.local_steps - self._plan.done >= self._plan.interval
        if self._says_bytes and self._per_round is None and whole_round and not self._ended:
            self._says_bytes = False
            self._say(f"DiLoCo: in its first round every worker sent {amount(ledger.total_bytes - self._sent_before)}.")

    def end(self) -> None:
        """The fit has ended normally."""
        self._ended = True
        self._say(self._what_was_sent())
        clock = self._engine.context.machines.clock
        if clock is not None and clock.compute_utilisation is not None:
            self._say(_on_the_cluster(clock))
        times = self._engine.stopwatch.times
        parts = {"inner steps": times.inner, "outer steps": times.outer}
        parts |= {"evaluation": times.evaluation, "waiting for other processes": times.waiting}
        training = perf_counter() - self._begun - times.evaluation
        rate = f"{self._engine.worker_steps / training:.3g} worker-steps per second"
        self._say("DiLoCo: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()) + f"; {rate}.")

    # ---------------------------------------------------------------------------------------- lines

    def _who(self) -> str:
        world, n = self._engine.world, self._engine.num_workers
        layout = counted(world.size, "process", "processes")
        if world.team > 1:
            layout += f", {world.team} per worker"
        every = counted(self._plan.interval, "local step")
        return f"DiLoCo: {counted(n, 'worker')} in {layout}; a synchronisation every {every} (H)."

    def _how_long(self) -> str:
        plan = self._plan
        if plan.steps is None or plan.rounds is None:
            return f"DiLoCo: the number of local steps is unknown: {plan.unknown}. {self._bytes()}"
        own = self._engine.algorithm.chooses_workers
        length = f"{'at most ' * plan.at_most}{counted(plan.steps, 'local step')}"
        length += " of the fastest worker" if own else " of each worker"
        length += f", {plan.done} of them done" if plan.done else ""
        if own:
            return f"DiLoCo: {length}; the others take as many as they can meanwhile."
        length += f" = {counted(plan.rounds, 'round')}"
        if plan.partial:
            last = "and a shorter last one" if plan.flushes else "and, without a synchronisation,"
            length += f" {last} of {counted(plan.partial, 'step')}"
        return f"DiLoCo: {length}. {self._bytes()}"

    def _bytes(self) -> str:
        if self._engine.num_workers == 1:
            return "A single worker sends nothing."
        if self._per_round is None:
            return "How many bytes a worker sends is known after the first round."
        total = self._plan.synchronisations
        in_all = "" if total is None else f", {amount(total * self._per_round)} in all"
        return f"Every worker sends {amount(self._per_round)} per round{in_all}."

    def _which_weights(self) -> str:
        choice = self._engine.policies.eval_weights
        return f'DiLoCo: validation and checkpoints see {_WEIGHTS[choice]} (eval_weights="{choice}").'

    def _further_processes(self) -> str:
        """What several processes would bring, where cores are left over."""
        engine = self._engine
        if engine.world.size > 1 or engine.world.device.type != "cpu":
            return ""
        cores = usable_cores()
        processes = max(k for k in range(1, cores + 1) if engine.num_workers % k == 0)
        if processes == 1:
            return ""
        return (
            f"DiLoCo: one process here, and {cores} cores: with `Trainer(devices={processes})` a step takes about"
            f" 1/{processes} of the time of one process with one thread; starting them takes some seconds."
        )

    def _how_large(self) -> str:
        report, world = self._with_outer_state(), self._engine.world
        each = amount(memory_per_worker(report))
        place = "" if world.size == 1 else " in each process"
        file = amount(checkpoint_bytes(report, self._engine.num_workers))
        total = f"{amount(report['total'])} in all{place}"
        return f"DiLoCo: memory {each} per worker, {total}; the tensors of a checkpoint up to {file}."

    def _what_was_sent(self) -> str:
        engine = self._engine
        done = f"DiLoCo: done after {counted(engine.local_steps, 'local step')}"
        done += f" and {counted(engine.outer_steps, 'outer step')}"
        if engine.num_workers == 1:
            return f"{done}. A single worker sends nothing."
        sent, parallel = engine.context.ledger.total_bytes, engine.local_steps * self._gradient_bytes()
        if engine.algorithm.chooses_workers:  # data parallelism on such machines would take other steps
            return f"{done}. A worker sent {amount(sent)} on average."
        share = f", {100 * sent / parallel:.3g} % of data parallelism's {amount(parallel)}" if parallel else ""
        return f"{done}. Every worker sent {amount(sent)}{share}."

    # ---------------------------------------------------------------------------------------- numbers

    def _gradient_bytes(self) -> int:
        """Of the parameters that are trained."""
        context = self._engine.context
        theta = context.outer.tensors
        return sum(theta[name].nbytes for name in context.names)

    def _known_bytes(self) -> int | None:
        """Bytes of a round if they are sure: those of Δ_i; None with all that may send less, more, or something else.

        Codecs' payloads depend on the values, and buffers are sent if they differ.
        """
        engine = self._engine
        sender = engine.context.sender
        dense = type(engine.algorithm) is Diloco and sender.codec is None and sender.participation is None
        report = engine.memory_report()
        others = report["buffers_per_worker"] and engine.policies.buffers != "local"
        frozen = len(engine.context.parameters) > len(engine.context.names)
        if not dense or others or frozen or engine.policies.inner_state == "average":
            return None
        return self._gradient_bytes()

    def _with_outer_state(self) -> dict[str, int]:
        """The memory report with the state that the outer optimizer will have from its first step on."""
        report = self._engine.memory_report()
        per_byte, per_tensor = self._outer_state
        state = int(per_byte * self._gradient_bytes()) + per_tensor * len(self._engine.context.names)
        missing = max(0, state - report["outer_state"])
        return {**report, "outer_state": report["outer_state"] + missing, "total": report["total"] + missing}


def _on_the_cluster(clock: Clock) -> str:
    busy = 100 * (clock.compute_utilisation or 0.0)
    line = f"DiLoCo: on the cluster {clock.seconds:,.6g} s, {busy:.3g} % of them computing"
    if not clock.compares:
        return f"{line}."
    parallel = clock.data_parallel
    of_parallel = 100 * (parallel.compute_utilisation or 0.0)
    return f"{line}; data parallelism would have taken {parallel.seconds:,.6g} s, {of_parallel:.3g} %."


def outer_state(factory: OuterFactory) -> tuple[float, int]:
    """The state that an outer optimizer will have: bytes per byte of its parameters, and further bytes per parameter.

    Found by a step on a dummy; nothing where that fails.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = trial_optimizer(factory)
            (parameter,) = [p for group in optimizer.param_groups for p in group["params"]]
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        state = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
    except Exception:  # the optimizer may be anybody's, and a line is not worth a run
        return 0.0, 0
    like = [t.nbytes for t in state if t.shape == parameter.shape]
    return sum(like) / parameter.nbytes, sum(t.nbytes for t in state) - sum(like)


def memory_per_worker(report: Mapping[str, int]) -> int:
    """Bytes that a further worker would add, by a memory report."""
    kinds = ("parameters", "buffers", "inner_state", "gradients")
    return sum(report[f"{kind}_per_worker"] for kind in kinds)


def checkpoint_bytes(report: Mapping[str, int], num_workers: int) -> int:
    """Bytes of the tensors in a checkpoint in the middle of a round, by a memory report.

    Every worker with its memory, θ with the outer state, and what any Lightning checkpoint has: a ``state_dict``, and
    the state of an inner optimizer.
    """
    model = report["parameters_per_worker"] + report["buffers_per_worker"]
    memory = report["algorithm_memory"] * num_workers // report["workers"]
    workers = num_workers * memory_per_worker(report) + memory
    return workers + report["outer_model"] + report["outer_state"] + model + report["inner_state_per_worker"]


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "worker"), counted(1200, "step")
    ('1 worker', '1,200 steps')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def amount(nbytes: int) -> str:
    """Bytes for people: exact below ten million.

    >>> amount(1_218_000), amount(12_180_000), amount(1_500_000_000)
    ('1,218,000 bytes', '12.2 MB', '1.5 GB')
    """
    if nbytes < 10_000_000:
        return counted(nbytes, "byte")
    unit, name = next((u, n) for u, n in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")) if nbytes >= u)
    return f"{nbytes / unit:.4g} {name}" if nbytes / unit >= 1000 else f"{nbytes / unit:.3g} {name}"
