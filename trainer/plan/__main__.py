"""Plan memory, time and cost of a training, without a GPU.

Examples:
    python -m trainer.plan +experiment=laion_512 plan.nodes=16 plan.gpu=h100_80gb
    python -m trainer.plan +experiment=laion_512 plan.compare=true
"""

from trainer.cli import main

OPTIONS = """
    plan task train deepspeed unet autoencoder conditioner diffusion ema.decays
    ema.sigma_rels checkpoint.every checkpoint.keep data.image_size data.flip
    data.store_text
"""

if __name__ == "__main__":
    main("trainer.plan.job:plan", about=__doc__, options=OPTIONS)
