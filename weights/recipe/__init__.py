"""How a miniature Stable Diffusion like weights/tiny is made from nothing; make.py puts the stages in order.

The picture book: world.py, abstract.py, pages.py. The stages: vocabulary.py, clip.py, vae.py,
made_up_words.py, unet.py, folder.py, measure.py; training.py has what they share. For experiments with the
miniature: concepts.py makes the sets of pictures, judge.py the network that knows them again, probe.py the
one that reads what any picture shows.
"""
