"""diffusers behind a lock: what most servers around a pipeline are, as pipelines are not thread-safe.

Eager, compiled, or with cache-dit (in its own environment). Pictures are decoded and encoded beside the pipeline.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import front
from protocol import Ask
from stock import Stock, examples


def compile_parts(stock: Stock) -> None:
    """The transformer's repeated blocks, for any length. A silent fall back to eager code would be no compiled peer."""
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    stock.pipe.transformer.compile_repeated_blocks(dynamic=True)


def cache_blocks(stock: Stock, threshold: float) -> None:
    """cache-dit's DBCache: a step whose first block moves less than `threshold` takes the other blocks from the step before.

    Two of four steps are always computed first, and never two cached in a row. Not for the KV pipeline: with cache-dit 1.5 its
    pictures are wrong even where no step is cached.
    """
    if stock.kind == "kv":
        raise ValueError("with cache-dit the KV pipeline makes wrong pictures; give --pipeline klein or inpaint.")
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=threshold,
        max_continuous_cached_steps=1, enable_separate_cfg=False,
    )  # fmt: skip
    cache_dit.enable_cache(stock.pipe, cache_config=config)


def main() -> None:
    parser = front.arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument("--cache-dit", type=float, metavar="THRESHOLD", help="cache blocks between steps with cache-dit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stock = Stock(args.model, args.pipeline, args.dtype, args.crop)
    if args.compile:
        compile_parts(stock)
    if args.cache_dit is not None:
        cache_blocks(stock, args.cache_dit)
    for ask in examples(args.compile):
        stock.edit(ask)
    lock = ThreadPoolExecutor(1)

    async def edit(ask: Ask) -> list[np.ndarray]:
        return await asyncio.get_running_loop().run_in_executor(lock, stock.edit, ask)

    front.serve(front.app(edit), args.port)


if __name__ == "__main__":
    front.run(main)
