"""Images: captions, questions, text and dialogues."""

import os
from collections import Counter
from pathlib import Path

from aveb.sets.common import SETS, Set, id_of, text_of, under


def llava(files):
    """llava_instruct_150k.json: [{"id":"000000000042","image":"000000000042.jpg","conversations":[
    {"from":"human","value":"<image>\\nWhat is shown?"},{"from":"gpt","value":"A cup."}, ...]}].
    COCO images: train2017/<image> or train2014/COCO_train2014_<image>."""
    for entry in files.json(list, "llava_instruct_150k.json"):
        turns, image = entry["conversations"], entry["image"]
        name = files.unique(entry["id"])          # an image has up to three conversations
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            files.drop("dialogue whose turns do not alternate", name)
            continue
        texts = [text_of(turn["value"]).replace("<image>", "").strip() for turn in turns]
        yield from files.dialogue(
            name, list(zip(texts[::2], texts[1::2], strict=True)), original_id=entry["id"],
            image=[*under(image, "train2017"), f"train2014/COCO_train2014_{image}",
                   f"COCO_train2014_{image}"])


OCRVQA = {"train": 1, "val": 2, "test": 3}


def ocrvqa(files):
    """dataset.json: {"0123456789":{"imageURL":"http://x/y.jpg","questions":["Who wrote this?"],
    "answers":["A. Nobody"],"title":"T","split":1}}; images/<key>.jpg (or .gif, .png)."""
    for key, book in files.json(dict, "dataset.json").items():
        if book["split"] != OCRVQA[files.split]:
            continue
        if len(book["questions"]) != len(book["answers"]):
            files.drop("book with unequal numbers of questions and answers", key)
            continue
        suffixes = dict.fromkeys((os.path.splitext(book["imageURL"])[1], ".jpg", ".png", ".gif"))
        images = [c for suffix in suffixes for c in under(key + suffix, "images")]
        for k, (asked, answer) in enumerate(zip(book["questions"], book["answers"], strict=True)):
            yield from files.record(f"{key}-{k}", asked, [answer], image=images, original_id=key)


def textvqa(files):
    """TextVQA_0.5.1_val.json: {"data":[{"question_id":1,"image_id":"0a1b","question":"what does the
    sign say?","answers":["stop", ... 10]}]}; images train_images/<image_id>.jpg, also for val.
    The test file has no answers."""
    folder = "test_images" if files.split == "test" else "train_images"
    for entry in files.json(dict, f"TextVQA_0.5.1_{files.split}.json")["data"]:
        answers = entry.get("answers", [])
        most = Counter(text_of(a).strip() for a in answers).most_common(1)
        yield from files.record(entry["question_id"], entry["question"], answers,
                                target=most[0][0] if most else "", image_id=entry["image_id"],
                                image=under(f"{entry['image_id']}.jpg", folder))


def flickr30k(files):
    """dataset_flickr30k.json (Karpathy): {"images":[{"filename":"1000.jpg","split":"test",
    "sentences":[{"raw":"A cat."}]}]}; or flickr30k_test.json: [{"image":"flickr30k-images/1.jpg",
    "caption":[5 texts]}]; or results_20130124.token, lines '1000.jpg#0<TAB>A cat .' (split: all).
    flickr30k-images/<filename>."""
    path, captions = files.find("dataset_flickr30k.json", f"flickr30k_{files.split}.json",
                                "results_20130124.token"), {}
    if path.suffix == ".token":
        if files.split != "all":
            raise ValueError(f"{path}: does not name the images of {files.split}; take "
                             "dataset_flickr30k.json (Karpathy's split), or --split all")
        for line in files.lines(path):
            name, _, text = line.partition("\t")
            captions.setdefault(name.partition("#")[0], []).append(text)
    elif path.name == "dataset_flickr30k.json":
        for entry in files.json(dict, path.name)["images"]:
            if files.split in (entry["split"], "all"):
                captions[entry["filename"]] = [s["raw"] for s in entry["sentences"]]
    else:
        for entry in files.json(list, path.name):
            texts = entry["caption"]
            captions[Path(entry["image"]).name] = [texts] if isinstance(texts, str) else texts
    for name, texts in captions.items():
        yield from files.record(id_of(name), "Describe this image in one short sentence.",
                                texts, image=under(name, "flickr30k-images", "Images"))


def gqa(files):
    """testdev_balanced_questions.json, by question id: {"20001":{"imageId":"n12345","question":
    "Is it raining?","answer":"no","fullAnswer":"No, it is dry.","types":{"structural":"verify"}}};
    images/<imageId>.jpg."""
    for key, entry in files.json(dict, f"{files.split}_questions.json").items():
        yield from files.record(key, entry["question"], [entry.get("answer", "")],
                                image=under(f"{entry['imageId']}.jpg", "images"),
                                type=entry.get("types", {}).get("structural"),
                                full_answer=entry.get("fullAnswer"), image_id=entry["imageId"])


def textcaps(files):
    """TextCaps_0.1_train.json: {"data":[{"image_id":"0a1b","caption_str":"A sign that says stop.",
    "caption_id":7}]}, one entry a caption; train_images/<image_id>.jpg."""
    folder = "test_images" if files.split == "test" else "train_images"
    for entry in files.json(dict, f"TextCaps_0.1_{files.split}.json")["data"]:
        yield from files.record(entry.get("caption_id", entry["image_id"]), "Describe the image.",
                                [entry.get("caption_str") or ""], image_id=entry["image_id"],
                                image=under(f"{entry['image_id']}.jpg", folder))


SETS.update({
    "llava": Set(llava, "vqa", ("train",), "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-"
                 "150K, CC BY-NC 4.0 and OpenAI's terms; images: COCO"),
    "ocrvqa": Set(ocrvqa, "ocr", ("train", "val", "test"), "ocr-vqa.github.io, no explicit licence",
                  metrics=("word_match",)),
    "textvqa": Set(textvqa, "ocr", ("val", "train", "test"),
                   "textvqa.org, CC BY 4.0; images: OpenImages, train_val_images.zip"),
    "flickr30k": Set(flickr30k, "ic", ("test", "val", "train", "all"),
                     "Karpathy's caption_datasets.zip; images by UIUC's form, non-commercial"),
    "gqa": Set(gqa, "vqa", ("testdev_balanced", "val_balanced", "train_balanced", "test_balanced"),
               "cs.stanford.edu/people/dorarad/gqa, questions1.2.zip, images.zip, CC BY 4.0"),
    "textcaps": Set(textcaps, "ic", ("train", "val", "test"),
                    "textvqa.org/textcaps, CC BY 4.0; TextVQA's images"),
})
