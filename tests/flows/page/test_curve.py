"""The loss curve as Prefect's pages draw it."""

from __future__ import annotations

import re

from flows.page.curve import loss_image, loss_markdown


def test_the_loss_is_a_mermaid_chart_of_bounded_size() -> None:
    text = loss_markdown("r", {n: 1.0 / n for n in range(1, 5000)})
    assert text.index("```mermaid\n%%{init") < text.index("\nxychart-beta\n")
    assert text.count(",") < 200
    assert "loss 1.0000 → 0.0002 at step 4999" in text
    assert "no steps yet" in loss_markdown("r", {})
    assert "loss 5.7329 at step 1\n" in loss_markdown("r", {1: 5.7329})
    assert "loss 2.0000 → 1.5e+30 at step 2" in loss_markdown("r", {1: 2.0, 2: 1.5e30})
    assert 'y-axis "loss" 0.0000 -->' in text
    assert "nan" not in loss_markdown("r", {1: 2.0, 2: float("nan"), 3: 1.0}).lower()


def test_the_loss_is_a_small_picture_too() -> None:
    address = loss_image({n: 1.0 / n for n in range(1, 5000)})
    assert address.startswith("data:image/svg+xml;utf8,<svg ")
    assert "#" not in address  # it would end the address
    assert len(address) < 2000
    assert re.findall(">([0-9.e-]+)</text>", address) == ["1", "0.0002", "1", "4999"]  # losses that there were
    assert "<polyline" in loss_image({1: float("nan")})
