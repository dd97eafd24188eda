"""`fastserve simulate` as users type it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastserve.bench import command, options
from fastserve.bench.sim.types import SimJob, SimOptions, SimResult
from fastserve.bench.sweep import SimulationError
from fastserve.bench.workloads import WORKLOADS
from fastserve.cli.main import app
from fastserve.scheduler.core import KvStrategy, SchedulerConfig
from fastserve.scheduler.core.policies import POLICIES

QUICK = ("--workload", "alpaca", "--jobs", "20")


def invoke(*arguments: str, width: int = 120) -> Any:
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["simulate", *arguments], env=environment)


def objects(*arguments: str) -> list[dict[str, Any]]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_one_run_prints_one_json_object_and_nothing_else() -> None:
    result = invoke(*QUICK, "--policy", "fcfs", "--rate", "3", "--seed", "9", "--json")
    found = json.loads(result.stdout)
    assert (found["policy"], found["rate"], found["jobs"], found["seed"]) == ("fcfs", 3.0, 20, 9)
    assert found["failed"] == 0 and found["per_token_s"]["mean"] > 0
    assert result.stderr == "" and result.stdout.count("\n") == 1


def test_the_same_command_gives_the_same_figures_and_another_seed_others() -> None:
    first = objects(*QUICK)
    assert objects(*QUICK) == first
    assert objects(*QUICK, "--seed", "1") != first


def test_one_run_prints_a_table_without_json() -> None:
    result = invoke(*QUICK)
    assert result.exit_code == 0
    assert "per-token latency" in result.stdout and "tokens/s" in result.stdout


def test_rates_policies_and_seeds_make_a_sweep_of_all_combinations() -> None:
    arguments = ("-r", "1,2", "-r", "4", "-p", "fcfs,mlfq", "--seeds", "2", "--processes", "1")
    found = objects(*QUICK, *arguments)
    assert len(found) == 3 * 2 * 2
    combinations = {(each["policy"], each["rate"], each["seed"]) for each in found}
    assert combinations == {(p, r, s) for p in ("fcfs", "mlfq") for r in (1, 2, 4) for s in (0, 1)}


def test_a_sweep_writes_a_csv_and_plots_and_says_where_it_crosses_the_slo(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    words = ("-r", "1,2", "--seeds", "2", "--processes", "2", "--slo", "9", "--out", str(out))
    result = invoke(*QUICK, *words)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "latency.png", "latency.svg", "runs.csv",
    ]  # fmt: skip
    assert len(list(csv.DictReader((out / "runs.csv").read_text().splitlines()))) == 4
    assert "more than 2 job/s" in result.stdout
    assert str(out / "latency.svg") in result.stderr
    assert "less than 1 job/s" in invoke(*QUICK, "-r", "1,2", "--slo", "0.001").stdout


def test_jobs_that_can_never_fit_are_reported_as_failed() -> None:
    words = ("--workload", "longtail", "--jobs", "60", "--kv-tokens", "2000")
    found = objects(*words)[0]
    assert 0 < found["failed"] < 60
    assert "failed" in invoke(*words, "-r", "1,2").stdout


def test_the_arrivals_of_a_trace_give_the_rate_and_the_number_of_jobs(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n10,5,2\n10.5,9,3\n12,5,1\n")
    words = ("--trace", str(trace), "--arrivals", "trace")
    found = objects(*words)[0]
    assert (found["jobs"], found["rate"], found["mean_output_tokens"]) == (3, 1.0, 2.0)
    assert objects(*words, "--rate", "4")[0]["rate"] == 4.0
    assert objects(*words, "--jobs", "2")[0]["rate"] == 2.0
    assert objects("--trace", str(trace), "--jobs", "9")[0]["jobs"] == 9


@dataclass
class Recorder:
    """In place of the simulator: notes what it is asked for, ends every job a second later."""

    jobs: list[SimJob]
    options: SimOptions | None = None

    def __call__(self, jobs: list[SimJob], options: SimOptions, _: object = None) -> SimResult:
        import numpy as np

        self.jobs, self.options = jobs, options
        arrival = np.array([job.arrival_s for job in jobs])
        return SimResult(
            arrival_s=arrival,
            prompt_tokens=np.array([job.prompt_tokens for job in jobs]),
            output_tokens=np.array([job.output_tokens for job in jobs]),
            first_token_s=arrival + 0.5,
            end_s=arrival + 1,
            service_s=np.ones(len(jobs)),
            served_s=np.ones(len(jobs)),
            tenants=[job.tenant for job in jobs],
            preemptions=0,
            migrations=0,
            offloaded_tokens=0,
            uploaded_tokens=0,
            recomputed_tokens=0,
            kv_wait_s=0.0,
            row_s=1.0,
            failed=0,
            makespan_s=float(arrival[-1] + 1 - arrival[0]),
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder([])
    monkeypatch.setattr("fastserve.bench.sweep.simulate", recorder)
    return recorder


def test_every_option_reaches_the_simulator(recorder: Recorder, tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(
        json.dumps({"prefill_ms": [1, 2, 3], "decode_ms": [4, 5, 6], "kv_bytes_per_token": 7,
                    "model": "tiny"})
    )  # fmt: skip
    objects(
        *QUICK, "--tenants", "3", "--policy", "srpt", "--cost-model", str(machine),
        "--max-num-seqs", "5", "--max-num-batched-tokens", "77", "--kv-tokens", "999",
        "--host-kv-tokens", "88", "--pcie-gbps", "1.5", "--copy-ms", "6", "--kv-strategy", "defer",
        "--block-size", "8", "--lease", "2", "--starvation-threshold", "0.3",
        "--workers", "2", "--worker-speed", "1,0.5",
        "--set", "levels=6", "--set", "quantum-ratio=4",
    )  # fmt: skip
    found = recorder.options
    assert found is not None and found.hardware.name == "tiny"
    assert found.speeds == (1.0, 0.5)
    assert {job.tenant for job in recorder.jobs} == {"tenant-1", "tenant-2", "tenant-3"}
    assert (found.policy, found.max_num_seqs, found.max_num_batched_tokens) == ("srpt", 5, 77)
    assert (found.kv_tokens, found.host_kv_tokens) == (999, 88)
    assert (found.pcie_gbps, found.copy_ms) == (1.5, 6)
    assert (found.kv_strategy, found.block_size, found.lease) == (KvStrategy.DEFER, 8, 2)
    assert found.scheduler == {"levels": 6, "quantum_ratio": 4.0, "starvation_s": 0.3}


def test_the_defaults_are_those_of_the_paper_and_of_the_cost_model(recorder: Recorder) -> None:
    objects("--jobs", "5")
    found = recorder.options
    assert found is not None and found.policy == SchedulerConfig().policy
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (16, 2048)
    assert (found.kv_tokens, found.host_kv_tokens) == (66_144, 661_440)
    objects("--jobs", "5", "--kv-tokens", "unlimited")
    assert recorder.options is not None
    assert (recorder.options.kv_tokens, recorder.options.host_kv_tokens) == (None, 0)
    objects()
    assert len(recorder.jobs) == command.DEFAULT_JOBS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--jobs many", "'--jobs'"),
        ("--jobs 0", "'--jobs'"),
        ("--jobs", "requires an argument"),
        ("--sed 1", "No such option: --sed"),
        ("extra", "extra"),
        ("--rate fast", "--rate: 'fast' is not a number"),
        ("--rate 1,0", "the rate must be greater than 0"),
        ("--rate nan", "the rate must be greater than 0"),
        ("--policy lifo", "policy 'lifo' is unknown: choose one of"),
        ("--workload lmsys", "workload 'lmsys' is unknown: choose one of"),
        ("--arrivals weekly", "arrivals 'weekly' are unknown"),
        ("--arrivals trace", "--arrivals trace needs --trace"),
        ("--arrivals gamma --cv 0", "the CV of arrivals must be greater than 0"),
        ("--trace none.csv", "none.csv cannot be read"),
        ("--trace none.csv --workload alpaca", "exclude each other"),
        ("--cost-model none.json", "cost model none.json cannot be read"),
        ("--kv-tokens lots", "neither a whole number nor 'unlimited'"),
        ("--kv-tokens 15", "at least one block of 16 tokens"),
        ("--host-kv-tokens -1", "'--host-kv-tokens'"),
        ("--workers 2 --worker-speed 1", "--worker-speed has 1 values for 2 workers"),
        ("--workers 2 --worker-speed 1,0", "--worker-speed must be greater than 0"),
        ("--worker-speed fast", "--worker-speed: 'fast' is not a number"),
        ("--copy-ms -1", "'--copy-ms'"),
        ("--pcie-gbps 0", "--pcie-gbps must be greater than 0"),
        ("--kv-strategy hope", "--kv-strategy: 'hope' is unknown: choose one of proactive"),
        ("--starvation-threshold 0", "starvation_s must be greater than 0"),
        ("--tenants 2 --tenant-skew -1", "skew of tenants must be 0 or more"),
        ("--slo 0", "--slo must be greater than 0"),
        ("--set levels", "not of the form name=value"),
        ("--set level=3", "'level' is unknown: choose one of"),
        ("--set levels=some", "levels must be a whole number, not 'some'"),
        ("--set levels=0", "levels must be at least 1, not 0"),
        ("--set lease=3", "an option of its own, --lease"),
        ("--set max_queued_jobs=3", "max_queued_jobs has no meaning here"),
    ],
)
def test_a_bad_value_is_one_sentence_and_exit_status_2(arguments: str, message: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_an_output_folder_that_cannot_be_is_refused_before_anything_runs(
    recorder: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = invoke(*QUICK, "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "--out" in result.stderr
    assert recorder.options is None


def test_a_trace_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n,1,1\n,x,1\n")
    result = invoke("--trace", str(trace))
    assert result.exit_code == 2
    assert result.stderr == f"{trace}, line 3: prompt_tokens must be a whole number, not 'x'\n"


def test_a_simulation_that_goes_wrong_is_one_sentence_and_exit_status_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise SimulationError("fcfs at 2 job/s, seed 0: stuck")

    monkeypatch.setattr(command, "execute", fails)
    result = invoke(*QUICK)
    assert result.exit_code == 1 and result.stderr == "fcfs at 2 job/s, seed 0: stuck\n"


def test_help_teaches_with_examples_and_names_all_there_is_to_choose() -> None:
    text = re.sub(r"[\s│]+", " ", invoke("--help", width=200).output)
    assert text.count("fastserve simulate") >= 5
    for name in (*WORKLOADS, *POLICIES, *KvStrategy, "poisson", "gamma"):
        assert re.search(rf"\b{name}\b", text), name


def test_fields_of_the_scheduler_take_values_of_their_types() -> None:
    assert options.scheduler_fields(["max_partial_prefills=3"]) == {"max_partial_prefills": 3}
    assert options.scheduler_fields(["promotion_share = 0.5"]) == {"promotion_share": 0.5}
    assert options.scheduler_fields(["starvation_s=inf"]) == {"starvation_s": float("inf")}


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int | None, "none", None),
        (int | None, "3", 3),
        (bool, "True", True),
        (bool, "false", False),
        (int | float, "0.5", 0.5),
        (str, "a b", "a b"),
        (KvStrategy, "reactive", KvStrategy.REACTIVE),
    ],
)
def test_values_are_read_by_the_type_of_the_field(hint: Any, text: str, value: object) -> None:
    assert options.typed("x", text, hint) == value


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "x must be a whole number, not '?'"),
        (float | None, "x must be a number or none, not '?'"),
        (bool, "x must be true or false, not '?'"),
        (KvStrategy, "x must be one of proactive, reactive, recompute, defer, not '?'"),
        (dict[str, float], "x must be something that cannot be given here, not '?'"),
    ],
)
def test_values_of_another_type_are_refused(hint: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^--set: ") as caught:
        options.typed("x", "?", hint)
    assert words in str(caught.value)


def test_other_commands_do_not_load_the_simulator() -> None:
    code = (
        "import sys, fastserve.cli.main\n"
        "heavy = {'numpy', 'matplotlib', 'fastserve.scheduler', 'multiprocessing.pool'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
