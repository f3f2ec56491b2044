"""The central experiment: a frozen plan, a resumable grid of cells, a report."""
