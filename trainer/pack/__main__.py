"""Pack raw images and captions into shards.

Examples:
    python -m trainer.pack +experiment=emoji
    python -m trainer.pack +experiment=laion_512 data.source.path=raw
    python -m trainer.pack +experiment=laion_512 verify=true   # every byte against the manifest
    python -m trainer.pack +experiment=laion_512 stats=true    # sizes, captions, contact sheet
"""

from trainer.cli import main

OPTIONS = """
    data.source data.dir data.train data.val data.image_size data.filters data.filters[]
    data.captions data.caption_fields data.caption_fields[] data.encoding data.pixels
    data.maps data.boxes
    pack verify stats
"""

if __name__ == "__main__":
    main("trainer.pack.job:pack", about=__doc__, options=OPTIONS)
