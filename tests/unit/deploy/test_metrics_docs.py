"""docs/observability.md lists the metrics that the services have.

`python tests/unit/deploy/test_metrics_docs.py` writes the tables anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "observability.md"
SERVICES = ("gateway", "scheduler", "worker", "kv-offload")


def fresh(page: str) -> str:
    """The page with the tables of now: what is between the marks of each service."""
    from support.services import metrics_table

    for service in SERVICES:
        begin, end = f"<!-- metrics of {service} -->\n", "<!-- end -->"
        table = "\n".join([*metrics_table(service), ""])
        page, count = re.subn(
            f"({re.escape(begin)}).*?({re.escape(end)})",
            lambda match, table=table: match[1] + table + match[2],  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        assert count == 1, f"the page has no place for the metrics of {service}"
    return page


def test_the_tables_are_fresh() -> None:
    page = PAGE.read_text()
    assert page == fresh(page), f"run python {Path(__file__).relative_to(ROOT)}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(fresh(PAGE.read_text()))
