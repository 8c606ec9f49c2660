// What Python cannot do in a page: keys, names for screen readers, and a word when no kernel answers.
(mark => {
  const box = mark.closest(".tclib-explorer");
  if (!box || box.tclibReady) return;
  box.tclibReady = true;
  if (document.querySelector(".jp-NotebookPanel")) box.classList.add("tclib-app");

  // JupyterLab takes arrow keys and letters for itself unless what has the focus says otherwise.
  box.addEventListener("focusin", event => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));

  // Enter sends a prompt, Shift and Enter begin another line of it.
  box.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
    event.preventDefault();
    event.target.dispatchEvent(new Event("change", {bubbles: true}));
  }, true);

  const set = (element, name, value) => element.getAttribute(name) === value || element.setAttribute(name, value);
  const name = () => {
    for (const control of box.querySelectorAll(".widget-inline-hbox")) {
      const label = control.querySelector(".widget-label")?.textContent.trim();
      if (!label) continue;
      for (const field of control.querySelectorAll("input, select, textarea")) set(field, "aria-label", label);
      const handles = [...control.querySelectorAll(".noUi-handle")];
      const values = (control.querySelector(".widget-readout")?.textContent ?? "").trim();
      const ends = handles.length === 2 ? values.split(/\s*[\u2013-]\s*/) : [values];
      handles.forEach((handle, number) => {
        set(handle, "aria-label", handles.length === 2 ? `${label}, ${number ? "to" : "from"}` : label);
        set(handle, "aria-valuetext", ends.length === handles.length ? ends[number] : values);
      });
      for (const group of control.querySelectorAll(".widget-toggle-buttons")) {
        set(group, "role", "group");
        set(group, "aria-label", label);
      }
      for (const button of control.querySelectorAll(".jupyter-button.widget-toggle-button, .widget-toggle-buttons button"))
        set(button, "aria-pressed", String(button.classList.contains("mod-active")));
    }
  };

  let waiting = 0;
  const silent = told => box.classList.toggle("tclib-silent", told);
  new MutationObserver(changes => {
    name();
    if (changes.some(change => change.target.closest?.(".widget-html-content, .tclib-progress"))) {
      clearTimeout(waiting);
      silent(false);
    }
  }).observe(box, {childList: true, subtree: true, characterData: true});
  const asked = event => {
    const told = event.type === "change" || event.target.closest("button.jupyter-button:not(.mod-active)");
    if (!told) return;
    clearTimeout(waiting);
    waiting = setTimeout(silent, 10000, true);
  };
  box.addEventListener("change", asked, true);
  box.addEventListener("click", asked, true);
  name();
})(this)
