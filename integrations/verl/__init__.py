"""In verl 0.9: its Megatron engine on this bridge, for Gemma 4 (`engine.py`).

verl finds it by the entry point `verl.plugins` of this package, and takes it where VERL_ENGINE_VENDOR=gemma4_bridge.
"""
