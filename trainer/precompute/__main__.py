"""Encode image shards into latent shards.

Examples:
    python -m trainer.precompute +experiment=emoji
    python -m trainer.precompute +experiment=laion_512 precompute.num_tasks=64 precompute.task=0
"""

from trainer.cli import main

OPTIONS = """
    precompute data.dir data.train data.latents data.image_size data.flip
    data.captions data.caption_fields[] data.encoding
    data.pixels data.maps data.boxes data.store_text data.store_images data.max_rejected_share
    data.cache autoencoder conditioner
"""

if __name__ == "__main__":
    main("trainer.precompute.job:precompute", about=__doc__, options=OPTIONS)
