"""Train a model, or go on from the run's last checkpoint.

Examples:
    python -m trainer +experiment=emoji
    python -m trainer +experiment=emoji run.name=wide "unet.block_out_channels=[64,128,256]"
    torchrun --nproc-per-node=8 -m trainer +experiment=laion_512 deepspeed=zero2
    python -m trainer +experiment=laion_512 --cfg job   # print the config, checked
    python -m trainer -m +experiment=emoji optim.lr=1e-3,1e-4   # train each in its own folder
"""

import signal

from trainer.cli import main
from trainer.runtime.steady import steady_output

OPTIONS = """
    task run train data data.mixture[] data.cache autoencoder autoencoder.loss
    autoencoder.loss.discriminator conditioner unet diffusion optim ema deepspeed
    checkpoint guards watchdog eval sampler logger.wandb
"""

if __name__ == "__main__":
    # imports take seconds: block Slurm's warning signal until trainer.train.stop handles it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    steady_output()
    main(
        "trainer.train.loop:fit",
        about=__doc__,
        options=OPTIONS,
        shares_batch=True,
        point="trainer.train.sweep:train_point",
        summary="trainer.train.sweep:summarise",
        has_own_folders=True,
    )
