"""A model in a script, without a server:  python examples/offline.py

The calls are those of vLLM's and Aphrodite's documentation of vision models; only the import, the model and the
images are others.
"""

from pathlib import Path

import PIL.Image

from handlers import LLM, SamplingParams

SHAPES = Path(__file__).parent / "shapes"
IMAGES = SHAPES / "pictures"

llm = LLM(model=str(SHAPES))

# One image, in a prompt as the model's card writes it
prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"
image = PIL.Image.open(IMAGES / "red-circle.png")
outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}})
for o in outputs:
    generated_text = o.outputs[0].text
    print(generated_text)

# Several prompts share each step of the model
image_1 = PIL.Image.open(IMAGES / "green-triangle.png")
image_2 = PIL.Image.open(IMAGES / "yellow-star.png")
outputs = llm.generate(
    [
        {
            "prompt": "USER: <image>\nWhat is the content of this image?\nASSISTANT:",
            "multi_modal_data": {"image": image_1},
        },
        {
            "prompt": "USER: <image>\nWhat's the color of this image?\nASSISTANT:",
            "multi_modal_data": {"image": image_2},
        },
    ]
)
for o in outputs:
    generated_text = o.outputs[0].text
    print(generated_text)

# Several images in one prompt
prompt = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is the content of each image?<|end|>\n<|assistant|>\n"
outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": [image_1, image_2]}})
for o in outputs:
    generated_text = o.outputs[0].text
    print(generated_text)

# Conversations, through the model's chat template
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {
        "role": "user",
        "content": [
            {"type": "image_pil", "image_pil": image},
            {"type": "text", "text": "What's in this image?"},
        ],
    },
]
outputs = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=32))
for o in outputs:
    generated_text = o.outputs[0].text
    print(generated_text)
