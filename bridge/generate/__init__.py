"""Generation with the Megatron model: sampling and the loop over rows; its caches are `bridge.megatron.kv_cache`.

`loop.Generator` answers with a live model; `session.Session` starts ranks that hold one.
"""
