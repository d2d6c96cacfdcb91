"""Citations: method -> the arXiv id of its paper, and the BibTeX entry to cite it by."""

from collections.abc import Mapping

CITATIONS: Mapping[str, Mapping[str, str]] = {
    "PRISM": {
        "arxiv": "2511.09905",
        "bibtex": """\
@misc{moser2025prism,
  title={PRISM: Diversifying Dataset Distillation by Decoupling Architectural Priors},
  author={Brian B. Moser and Shalini Sarode and Federico Raue and Stanislav Frolov and Krzysztof Adamkiewicz and
    Arundhati Shanbhag and Joachim Folz and Tobias C. Nauen and Andreas Dengel},
  year={2025},
  eprint={2511.09905},
  archivePrefix={arXiv},
  primaryClass={cs.LG}
}""",
    },
    "SRe2L": {
        "arxiv": "2306.13092",
        "bibtex": """\
@inproceedings{yin2023squeeze,
  title={Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective},
  author={Yin, Zeyuan and Xing, Eric and Shen, Zhiqiang},
  booktitle={Thirty-seventh Conference on Neural Information Processing Systems},
  year={2023}
}""",
    },
    "G-VBSM": {
        "arxiv": "2311.17950",
        "bibtex": """\
@inproceedings{shao2024generalized,
  title={Generalized Large-Scale Data Condensation via Various Backbone and Statistical Matching},
  author={Shao, Shitong and Yin, Zeyuan and Zhou, Muxin and Zhang, Xindong and Shen, Zhiqiang},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}""",
    },
}
