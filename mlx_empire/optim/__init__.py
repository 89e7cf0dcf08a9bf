"""The optimizer as pure functions over flat shards: AdamW, 8-bit states, exact masters, schedules, norm.

Nothing here knows of ranks' messages, models or files. May import `adapters`, `data`, `comm`, `plan`,
`cluster`, `recipe` and `errors`.
"""
