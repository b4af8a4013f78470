"""lm-evaluation-harness: `python -m integrations.lm_eval run --model gemma4_bridge …` scores a model without export."""
