// A tap on a diagram, or Enter, shows it as large as the window; a second tap, Enter or Escape closes it.
document.addEventListener("DOMContentLoaded", () => {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  const close = document.createElement("button");
  close.textContent = "Close";
  dialog.append(close);
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);

  for (const diagram of document.querySelectorAll("div.diagram")) {
    const button = document.createElement("button");
    button.className = "enlarge";
    button.setAttribute("aria-label", "Enlarge the figure");
    // role="img" hides what it holds from screen readers, so the button stands beside it.
    const frame = document.createElement("div");
    frame.className = "diagram";
    diagram.replaceWith(frame);
    diagram.className = "";
    frame.append(diagram, button);
    button.addEventListener("click", () => {
      const wide = diagram.querySelector("svg.wide");
      // The drawing itself moves: a copy would have the same names for its parts.
      frame.style.minHeight = `${frame.offsetHeight}px`;
      dialog.prepend(wide);
      dialog.setAttribute("aria-label", diagram.getAttribute("aria-label"));
      dialog.showModal();
      dialog.addEventListener("close", () => {
        diagram.prepend(wide);
        frame.style.minHeight = "";
      }, { once: true });
    });
  }
});
