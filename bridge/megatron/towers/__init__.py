"""What turns images, video and audio into soft tokens, in native Megatron modules.

Every front takes what the Hugging Face processors produce and returns soft tokens [n, width] without padding, on every
tensor-parallel rank the same. None of them knows of the decoder, its sequence or its pipeline.
"""
