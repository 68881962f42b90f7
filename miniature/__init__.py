"""AVEB in miniature: the benchmark's eleven tasks on generated clips. Each clip is written as a
real .mp4, .wav or .png file with a JSONL manifest, and is read back like anybody's data.

     world.py     colours, shapes, lips, digits, sounds and voices: how things look and sound
     scenes.py    what happens in a clip, and the questions about it
     generate.py  scenes -> files and manifests: `make`
     pretrain.py  trains the tiny Whisper, InstructBLIP and LLaMA that the tiny FAVOR starts from
     sheet.py     draws docs/miniature.png;  voices.py  renders the spoken words

The first three load neither torch nor the model."""
