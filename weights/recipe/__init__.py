"""Make a miniature Stable Diffusion like weights/tiny from scratch; make.py runs the stages in order.

The picture book: world.py, abstract.py, pages.py. The stages: vocabulary.py, clip.py, vae.py,
made_up_words.py, unet.py, folder.py, measure.py, with training.py shared. Experiments: concepts.py makes
sets of pictures, judge.py the network that recognises them, probe.py the one that reads any picture.
"""
