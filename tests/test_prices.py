"""Prices: what fits a device, whose word counts, and what is refused; the device's name without torch."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from retouch import config, prices, record, serve
from retouch.edit import InvalidOption, Usage
from retouch.prices import Price
from retouch.serve.books import Books
from retouch.serve.settings import Settings

OWN = '[[price]]\ndevice = "{}"\n{}\nsource = "our contract"\ndate = 2026-11-01\n'


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str, name: str = "prices.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_what_time_costs() -> None:
    assert prices.dollars(Usage({"document": 1.0, "step": 2.0}), 1200.0) == pytest.approx(1.0)
    assert prices.dollars(Usage({"step": 2.0}), 0.0) == 0.0
    assert prices.dollars(Usage({"step": 2.0}), None) is None
    assert prices.spent(7200, 1.5) == 3.0


@pytest.mark.parametrize(
    ("name", "per_hour"),
    [
        ("NVIDIA H100 80GB HBM3", 3.9492), ("NVIDIA H100 PCIe", 3.9492), ("nvidia h200", 4.5396),
        ("NVIDIA A100-SXM4-80GB", 2.4984), ("NVIDIA A100 80GB PCIe", 2.4984), ("NVIDIA L40S", 1.9512), ("NVIDIA L4", 0.7992),
        ("NVIDIA GeForce RTX 4090", 1.116), ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA GH200 480GB", None), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("Tesla T4", None), ("", None),
    ],
)  # fmt: skip
def test_common_devices_have_an_example(name: str, per_hour: float | None) -> None:
    found = prices.find(prices.table(), name)
    assert (found and found.per_hour) == per_hour


def test_a_processor_is_priced_by_its_cpus() -> None:
    found = prices.find(prices.table(), "AMD EPYC 7R13 Processor", 16)
    assert found is not None
    assert found.per_hour == pytest.approx(16 * 0.0425)
    assert found.source.startswith("16 vCPUs, recalled, not looked up")
    assert not found.vcpu
    assert prices.find(prices.table(), "", 16) is None


def test_every_shipped_price_says_where_it_is_from() -> None:
    shipped = prices.read(prices.SHIPPED)
    assert len(shipped) >= 7
    for one in shipped:
        assert "." in one.source.split("/")[0]
        assert date(2024, 1, 1) < date.fromisoformat(one.date) <= date.today()
        assert one.date in one.said


def test_the_users_own_come_first_and_the_first_that_fits_is_taken(write) -> None:
    text = OWN.format("*H100*", "per_hour = 2") + OWN.format("NVIDIA H100 PCIe", "per_hour = 1")
    own = write(text + OWN.format("AMD*", "per_hour = 0.5") + OWN.format("Intel*", "per_vcpu_hour = 0.1"))
    table = prices.table(own)
    assert prices.find(table, "NVIDIA H100 PCIe") == Price("*H100*", 2.0, "our contract", "2026-11-01")
    assert prices.find(table, "NVIDIA L4") == prices.find(prices.table(), "NVIDIA L4")
    for name, cpus, per_hour in (("AMD EPYC", 8, 0.5), ("Intel Xeon", 8, 0.8), ("Neoverse", 8, 0.34)):
        found = prices.find(table, name, cpus)
        assert found is not None
        assert found.per_hour == pytest.approx(per_hour)


def test_a_date_may_be_text(write) -> None:
    (one,) = prices.read(write(OWN.format("x", "per_hour = 0").replace("2026-11-01", '"2026-11-01"')))
    assert (one.per_hour, one.date) == (0.0, "2026-11-01")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (OWN.format("x", "per_hour = -1"), r"price 1: per_hour is -1; give dollars, 0 or more"),
        (OWN.format("x", "per_hour = nan"), "per_hour is nan"),
        (OWN.format("x", "per_hour = inf"), "per_hour is inf"),
        (OWN.format("x", "per_hour = 1e6"), "per_hour is 1000000.0"),
        (OWN.format("x", "per_hour = true"), "per_hour is True"),
        (OWN.format("x", 'per_hour = "2"'), "per_hour is '2'"),
        (OWN.format("x", "per_hour = []"), "per_hour is "),
        (OWN.format("x", ""), "has no price; give either per_hour or per_vcpu_hour"),
        (OWN.format("x", "per_hour = 1\nper_vcpu_hour = 1"), "has per_hour and per_vcpu_hour; give either"),
        (OWN.format("x", "per_hour = 1\nper_minute = 1"), "unknown field 'per_minute'; known are device, per_hour"),
        (OWN.format("", "per_hour = 1"), "price 1 has no device"),
        (OWN.format("x", "per_hour = 1") + '[[price]]\nper_hour = 1\nsource = "x"\ndate = 2026-01-01', "price 2 has no device"),
        (OWN.format("x", "per_hour = 1").replace("our contract", " "), "has no source"),
        (OWN.format("x", "per_hour = 1").replace("2026-11-01", "2026-11-01T10:00:00"), "give the day you looked"),
        (OWN.format("x", "per_hour = 1").replace("2026-11-01", '"last week"'), "date is 'last week'"),
        ('[[price]]\ndevice = "x"\nper_hour = 1\nsource = "x"', "date is None"),
        ("price = 3", "has to hold"),
        ("price = [3]", "price 1 is 3"),
        ("", "has to hold"),
        ('currency = "EUR"\n' + OWN.format("x", "per_hour = 1"), "has to hold"),
        ("[[price]", "cannot be read"),
    ],
)
def test_what_is_no_price_is_refused_with_the_file(write, text: str, reason: str) -> None:
    path = write(text, "wrong.toml")
    with pytest.raises(InvalidOption, match=reason) as caught:
        prices.table(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(InvalidOption, match="cannot be read"):
            prices.read(path)
        with pytest.raises(InvalidOption, match="cannot be read"):
            serve.main(["--port", "0", "--ledger", "none", "--prices", str(path)])


def test_where_things_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETOUCH_PRICES", "RETOUCH_DATA", "RETOUCH_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.data_folder() == tmp_path / ".local" / "share" / "retouch"
    assert config.cache_folder() == tmp_path / ".cache" / "retouch"
    assert config.ledger_file() == config.data_folder() / "ledger.sqlite"
    assert config.prices_file() is None
    own = tmp_path / ".config" / "retouch" / "prices.toml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert config.prices_file() == own
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    assert config.prices_file() is None
    monkeypatch.setenv("RETOUCH_PRICES", "named.toml")
    assert config.prices_file() == Path("named.toml")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert config.data_folder() == Path("/data/retouch")
    monkeypatch.setenv("RETOUCH_DATA", "/own")
    assert config.data_folder() == Path("/own")


def test_a_gpus_name_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "NVIDIA", tmp_path)
    assert record.device_name("cuda") == ""
    for bus, name in (("0000:01:00.0", "NVIDIA H100 80GB HBM3"), ("0000:02:00.0", "NVIDIA H100 80GB HBM3")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 0\nGPU UUID: \t GPU-1\n")
    assert record.device_name("cuda:1") == "NVIDIA H100 80GB HBM3"
    assert record.device_name("cpu") == record.processor()
    (tmp_path / bus / "information").write_text("Model: NVIDIA L4\n")
    assert record.device_name("cuda:1") == ""


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(record, "QUOTA", quota)
    every = record.vcpus()
    assert every >= 1
    for text, cpus in (("max 100000\n", every), ("50000 100000\n", 0.5), ("100000000 100000\n", every), ("what\n", every)):
        quota.write_text(text)
        assert record.vcpus() == cpus


def books(device: str = "cpu", **more) -> Books:
    return Books(Settings(**more), {"device": device}, "mini")


def test_the_servers_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(record, "NVIDIA", tmp_path)
    monkeypatch.setattr(record, "vcpus", lambda: 4.0)
    assert books().price is None
    assert books(prices=prices.table()).per_hour == pytest.approx(0.17)
    named = books(price=9.0, prices=prices.table())
    assert (named.per_hour, named.price and named.price.said) == (9.0, "--price")
    assert not caplog.records
    assert books("cuda", prices=prices.table()).price is None
    assert "no price is known for this device (cuda)" in caplog.text
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "information").write_text("Model: NVIDIA L40S\n")
    assert books("cuda:0", prices=prices.table()).per_hour == 1.9512
    assert books("cuda:0").device == "NVIDIA L40S"
