"""Gradient trajectories: the closed form is autograd's, masks stay with images, stopped epochs are taken up again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.data.images import ImagePool, list_rows, read_pool
from tinyusfm_edge.training.coreset.proxy import Proxy, ProxyConfig, embed_pool, gradient_norms, mask_order
from tinyusfm_runtime.errors import InputError

SMALL = ProxyConfig(image_size=64, epochs=3, batch=8, width=32, depth=2, heads=2, learning_rate=2e-3)


@pytest.fixture(scope="module")
def pool(table: Path) -> ImagePool:
    return read_pool(list_rows([table]).rows, 64)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_both_forms_give_the_norm_of_the_sum_of_outer_products(b: int, p: int, d: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, delta = torch.randn(b, p, d, generator=generator), torch.randn(b, p, k, generator=generator)
    expected = torch.stack([(delta[i].T @ h[i]).norm() for i in range(b)])
    torch.testing.assert_close(gradient_norms(h, delta), expected, atol=1e-4, rtol=1e-4)


def test_closed_form_equals_autograd_image_by_image(pool: ImagePool, tmp_path: Path) -> None:
    proxy = Proxy(pool, SMALL, tmp_path, "cpu")
    rows = np.arange(5)
    found = proxy._pass(rows, None)
    net = proxy.objective
    for row in rows:
        image = torch.from_numpy(pool.pixels_NSS[row : row + 1])[:, None].float() / 255
        order = mask_order(pool.ids[row], 16)[None]
        net.zero_grad()
        loss, _ = net({"image": image, "order": order})
        loss.backward()
        assert net.head.weight.grad is not None
        assert found[row] == pytest.approx(float(net.head.weight.grad.norm()), rel=1e-4)


def test_an_image_keeps_its_mask_and_two_images_have_two() -> None:
    assert torch.equal(mask_order("a/1.png", 49), mask_order("a/1.png", 49))
    assert not torch.equal(mask_order("a/1.png", 49), mask_order("a/2.png", 49))
    assert mask_order("a/1.png", 49).sort().values.tolist() == list(range(49))


def test_every_image_is_recorded_in_every_epoch_whoever_trained(pool: ImagePool, tmp_path: Path) -> None:
    proxy = Proxy(pool, ProxyConfig(**{**_values(SMALL), "share": 0.5}), tmp_path, "cpu")
    found = proxy.run()
    assert found.shape == (24, 3)
    assert bool((found > 0).all())
    assert (len(proxy.trained), len(proxy.rest)) == (12, 12)


def _values(config: ProxyConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ProxyConfig.__dataclass_fields__}


def test_a_stopped_proxy_goes_on_to_the_same_trajectories(pool: ImagePool, tmp_path: Path) -> None:
    whole = np.array(Proxy(pool, SMALL, tmp_path / "whole", "cpu").run())
    batches = iter(range(5))

    def stopping(items: Iterable[Any], _label: str, _total: int) -> Iterator[Any]:
        for item in items:
            if next(batches, None) is None:
                raise RuntimeError("stopped")
            yield item

    with pytest.raises(RuntimeError, match="stopped"):
        Proxy(pool, SMALL, tmp_path / "broken", "cpu").run(stopping)
    again = Proxy(pool, SMALL, tmp_path / "broken", "cpu")
    assert again.epoch == 1
    assert np.array_equal(again.run(), whole)
    other = Proxy(pool, ProxyConfig(**{**_values(SMALL), "seed": 9}), tmp_path / "broken", "cpu")
    assert other.epoch == 0, "another proxy starts again"


def test_embeddings_are_means_over_patches_in_order(pool: ImagePool, tmp_path: Path) -> None:
    def tokens(image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1)[:, :, None].expand(-1, -1, 2) * torch.tensor([1.0, -2.0])

    found = embed_pool(pool, tokens, 2, tmp_path / "e.f32", batch=7)
    mean = pool.pixels_NSS.reshape(24, -1).mean(1) / 255
    np.testing.assert_allclose(found, np.stack([mean, -2 * mean], 1), rtol=1e-4)


def test_a_pool_of_another_size_is_refused(pool: ImagePool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="squares of 64"):
        Proxy(pool, ProxyConfig(image_size=112), tmp_path, "cpu")
