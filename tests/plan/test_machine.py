"""The limits are measured once in a process and come out as a machine's could."""

from benthic.plan import machine


def test_rates_are_plausible_and_measured_once(monkeypatch):
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 2**24)
    monkeypatch.setattr(machine, "_SIZE", 256)
    machine.measure_gemm_gflops.cache_clear()
    machine.measure_bandwidth_gb_s.cache_clear()
    try:
        rates = [machine.measure_gemm_gflops(), machine.measure_bandwidth_gb_s()]
        assert 0.1 < rates[0] < 1e6
        assert 0.1 < rates[1] < 1e5
        assert [machine.measure_gemm_gflops(), machine.measure_bandwidth_gb_s()] == rates
    finally:
        machine.measure_gemm_gflops.cache_clear()
        machine.measure_bandwidth_gb_s.cache_clear()
