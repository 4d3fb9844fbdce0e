"""Models on disk: quantize one, export one, run one."""
