"""Who holds which elements, and what a step costs in bytes and seconds: pure functions over numbers.

The dry run, the engine, the checkpoints and the export all consume the same ShardPlan and the same ledger.
"""
