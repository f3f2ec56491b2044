"""Measures Babl beside what else does the same work: `python -m babl.scripts.bench JOB`, a file a job.

    python -m babl.scripts.bench generate --compile --out benchmarks/generate-cpu.json
    python -m babl.scripts.bench lookup MODEL DATA.json
    python -m babl.scripts.bench load
    python -m babl.scripts.bench backends --out benchmarks/backends-cpu.json
    python -m babl.scripts.bench busy --out benchmarks/busy-cpu.json
    python -m babl.scripts.bench overlap --out benchmarks/overlap-cpu.json
    python -m babl.scripts.bench score --out benchmarks/score-cpu.json
    python -m babl.scripts.bench kernels --table --out benchmarks/kernels-gpu.json
    python -m babl.scripts.bench gpu --out benchmarks/training-gpu.json
    python -m babl.scripts.bench compile --out benchmarks/kernels-compiled.json

What is compared runs in turn, A B A B, so that the moods of a machine fall on both; a ratio is the median over the
turns. Tables are printed as Markdown; `--out` keeps every single figure, with machine and versions. `generate` compares
with transformers, which the extra `dev` installs.
"""
