"""What the machine is, what an hour of it costs, and how fast it is at the moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retouch import config, prices, record
from retouch.edit import InvalidOption

ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is torch's name of it, `dtype` the one that all subjects compute in."""

    device: str
    dtype: str
    threads: int

    @classmethod
    def here(cls, dtype: str, threads: int | None) -> Machine:
        """`dtype` auto: the one that is faster here, as `retouch serve` has it. Raises InvalidOption."""
        import torch

        from retouch.models.dtype import choose

        count = max(1, int(record.vcpus())) if threads is None else threads
        torch.set_num_threads(count)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device.type, str(choose(dtype, device)).removeprefix("torch."), count)

    @property
    def name(self) -> str:
        return record.device_name(self.device)

    def rate(self) -> float:
        """FLOP/s of square matrix products, now: it shows whether the machine was slower for one subject than for another."""
        import torch

        from retouch.models.dtype import DTYPES, matmul_rate

        size = 8192 if self.device == "cuda" else 1024
        return matmul_rate(DTYPES[self.dtype], torch.device(self.device), size, ROUNDS)

    def price(self, per_hour: float | None, table: Path | None) -> prices.Price:
        """Of an hour of it. Raises InvalidOption where nobody knows."""
        if per_hour is not None:
            if not 0 < per_hour < prices.MOST:
                raise InvalidOption(f"--price is {per_hour:g}; give dollars an hour of this machine, above 0.")
            return prices.Price(self.name, per_hour, "--price")
        vcpus = None if self.device == "cuda" else record.vcpus()
        found = prices.find(prices.table(table or config.prices_file()), self.name, vcpus)
        if found is None or not found.per_hour:
            raise InvalidOption(f"no price above 0 is known of {self.name or 'this device'}; give --price, dollars an hour.")
        return found
