// Draws the figures in the reader's colours, hides what is pressed, and shades tokens by gates.
"use strict";
(() => {
  const swap = JSON.parse(document.getElementById("swap").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll("figure.plot")];
  let printing = false;

  // What a name's button is for: its own figure, or all of its section.
  const holder = (button) => button.closest("figure.plot") || button.closest("section");

  function coloured(text) {
    const on = dark.matches && !printing;
    return JSON.parse(on ? text.replace(/#[0-9A-Fa-f]{6}/g, (hex) => swap[hex] || hex) : text);
  }

  function draw(figure) {
    const value = coloured(figure.querySelector("script").textContent);
    const off = [...figure.closest("section").querySelectorAll("[aria-pressed=false]")];
    const hidden = new Set(off.filter((button) => holder(button).contains(figure))
      .map((button) => button.dataset.key));
    for (const trace of value.data) trace.visible = !hidden.has(trace.meta);
    return Plotly.react(figure.querySelector(".canvas"), value.data, value.layout,
      { displayModeBar: false, responsive: true, showTips: false, doubleClick: false });
  }

  const drawAll = () => plots.forEach(draw);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-key]");
    if (!button) return;
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
    plots.filter((figure) => holder(button).contains(figure)).forEach(draw);
  });
  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  drawAll();

  for (const box of document.querySelectorAll(".gates")) {
    const gates = JSON.parse(box.querySelector("script").textContent);
    const form = box.querySelector("form");
    const texts = [...box.querySelectorAll(".tokens")];
    const said = (name) => box.querySelector(`output[name=${name}]`);
    const fill = (select, values) => {
      const before = select.value;
      select.replaceChildren(...values.map((value) => new Option(value, value)));
      if (values.map(String).includes(before)) select.value = before;
    };
    let chosen = [];
    const number = () => (form.text ? Number(form.text.value) : 0);

    function shade() {
      const layers = gates[form.arm.value];
      fill(form.layer, Object.keys(layers));
      const ofText = layers[form.layer.value][number()];
      const branches = ofText[0].map((_, branch) => branch);
      fill(form.branch, branches.length > 1 ? ["mean", ...branches] : branches);
      const branch = form.branch.value;
      chosen = ofText.map((token) => branch === "mean"
        ? token.reduce((sum, gate) => sum + gate, 0) / token.length : token[Number(branch)]);
      const low = Math.min(...chosen), high = Math.max(...chosen);
      texts.forEach((text, place) => { text.hidden = place !== number(); });
      [...texts[number()].children].forEach((span, place) => {
        const share = high > low ? (chosen[place] - low) / (high - low) : 0;
        span.style.setProperty("--gate", share.toFixed(3));
        span.title = `gate ${chosen[place].toFixed(3)}, before block ${form.layer.value}, branch ${branch}`;
      });
      said("low").textContent = low.toFixed(2);
      said("high").textContent = high.toFixed(2);
      said("said").textContent = "";
    }

    function tell(event) {
      const span = event.target.closest(".tokens span");
      if (!span) return;
      const place = [...span.parentNode.children].indexOf(span);
      said("said").textContent = `\u201c${span.textContent}\u201d ${chosen[place].toFixed(3)}`;
    }
    form.addEventListener("change", shade);
    form.addEventListener("submit", (event) => event.preventDefault());
    box.addEventListener("pointerover", tell);
    box.addEventListener("click", tell);
    shade();
  }

  const links = new Map([...document.querySelectorAll("nav a")]
    .map((link) => [link.getAttribute("href").slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  document.querySelectorAll("section").forEach((section) => watch.observe(section));
})();
