"""Who holds which elements, what that costs in bytes, and which model it is: pure functions over numbers.

The dry run, the engine, the checkpoints and the export all consume the same ShardPlan and the same ledger.
May import `cluster`, `recipe` and `errors` only.
"""
