"""Alerts and dashboards in the hands of Prometheus itself, where its tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.chart import find, render
from support.chart_promql import expressions

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")

LEADER = 'shard="s",namespace="llm",pod="p"'
WORKER = 'namespace="llm",pod="w"'
GATEWAY = 'namespace="llm",pod="g"'
_TTFT = "vllm:time_to_first_token_seconds_bucket"
# Alert -> series that set it off within a quarter of an hour, and those that must not.
ALERTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "FastServeNoLeader": (
        {f"fastserve_leader{{{LEADER}}}": "0x30"},
        {
            f"fastserve_leader{{{LEADER}}}": "1x30",
            'fastserve_leader{namespace="llm",shard="s"}': "0x30",
        },
    ),
    "FastServeNoWorkers": (
        {f"fastserve_workers_connected{{{LEADER}}}": "0x30"},
        {f"fastserve_workers_connected{{{LEADER}}}": "1x30"},
    ),
    "FastServeNotDurable": (
        {f"fastserve_durable{{{LEADER}}}": "0x30", f"fastserve_leader{{{LEADER}}}": "1x30"},
        # A standby.
        {f"fastserve_durable{{{LEADER}}}": "0x30", f"fastserve_leader{{{LEADER}}}": "0x30"},
    ),
    "FastServeRedisErrors": (
        {f'fastserve_redis_errors_total{{{LEADER},kind="timeout"}}': "0+1x30"},
        {f'fastserve_redis_errors_total{{{LEADER},kind="fenced"}}': "0+1x30"},
    ),
    "FastServeQueuedWork": (
        {f'fastserve_queued_work_seconds{{{LEADER},worker="{w}"}}': "90x30" for w in "ab"},
        {
            f'fastserve_queued_work_seconds{{{LEADER},worker="a"}}': "90x30",
            f'fastserve_queued_work_seconds{{{LEADER},worker="b"}}': "1x30",
        },
    ),
    "FastServeSlowFirstToken": (
        {
            f'{_TTFT}{{{GATEWAY},model_name="m",le="5"}}': "0x30",
            f'{_TTFT}{{{GATEWAY},model_name="m",le="20"}}': "0+9x30",
            f'{_TTFT}{{{GATEWAY},model_name="m",le="+Inf"}}': "0+9x30",
        },
        {
            f'{_TTFT}{{{GATEWAY},model_name="m",le="5"}}': "0+9x30",
            f'{_TTFT}{{{GATEWAY},model_name="m",le="+Inf"}}': "0+9x30",
        },
    ),
    "FastServeRefusing": (
        {f'fastserve_gateway_requests_total{{{GATEWAY},outcome="rejected_capacity"}}': "0+1x30"},
        {f'fastserve_gateway_requests_total{{{GATEWAY},outcome="completed"}}': "0+1x30"},
    ),
    "FastServeFailing": (
        {
            f'fastserve_gateway_requests_total{{{GATEWAY},outcome="failed"}}': "0+1x30",
            f'fastserve_gateway_incoming_requests_total{{{GATEWAY},route="r"}}': "0+9x30",
        },
        {
            f'fastserve_gateway_requests_total{{{GATEWAY},outcome="failed"}}': "0x30",
            f'fastserve_gateway_incoming_requests_total{{{GATEWAY},route="r"}}': "0+9x30",
        },
    ),
    "FastServeKvDamaged": (
        {f'fastserve_kv_verify_failures_total{{{WORKER},tier="host"}}': "0+1x30"},
        {f'fastserve_kv_verify_failures_total{{{WORKER},tier="host"}}': "3x30"},
    ),
    "FastServeControlOverhead": (
        {
            f"fastserve_control_seconds_sum{{{WORKER}}}": "0+9x30",
            f'fastserve_iteration_seconds_sum{{{WORKER},phase="decode"}}': "0+50x30",
        },
        {
            f"fastserve_control_seconds_sum{{{WORKER}}}": "0+1x30",
            f'fastserve_iteration_seconds_sum{{{WORKER},phase="decode"}}': "0+50x30",
        },
    ),
}


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    result = subprocess.run(
        [PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    found = [*expressions(render("everything")), *expressions(render("keda"))]
    rules = [{"record": f"e:{at}", "expr": expr} for at, expr in enumerate(found)]
    assert len(rules) > 60
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]})
    )
    promtool("check", "rules", tmp_path / "rules.yaml")


def alerts() -> dict[str, dict[str, Any]]:
    rule = find(render("everything"), "PrometheusRule")
    return {found["alert"]: found for found in rule["spec"]["groups"][0]["rules"]}


def test_every_alert_has_its_example() -> None:
    assert set(alerts()) == set(ALERTS)


def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump(find(render("everything"), "PrometheusRule")["spec"])
    )
    tests = []
    for name, cases in ALERTS.items():
        firing = f'ALERTS{{alertname="{name}",alertstate="firing"}}'
        for fires, series in zip((True, False), cases, strict=True):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": s, "values": v} for s, v in series.items()],
                    # How many alerts: promtool compares them whole, texts and all.
                    "promql_expr_test": [
                        {
                            "expr": f"count({firing}) or vector(0)",
                            "eval_time": "16m",
                            "exp_samples": [{"labels": "{}", "value": int(fires)}],
                        }
                    ],
                }
            )
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", tmp_path / "tests.yaml")


def test_an_alert_that_looks_at_the_wrong_thing_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump(
            {"groups": [{"name": "g", "rules": [{"record": "a:b", "expr": "sum by (a"}]}]}
        )
    )
    with pytest.raises(AssertionError, match="unclosed left paren"):
        promtool("check", "rules", tmp_path / "rules.yaml")
